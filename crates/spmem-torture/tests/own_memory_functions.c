/* A program with a memcpy of its own, as sanitizers and some allocators have, that looks at data of its own. */
#include <stdio.h>
#include <stdlib.h>

enum { PAGES = 12288, WORDS = 512 };
static volatile unsigned long table[64 * WORDS];

__attribute__((optimize("no-tree-loop-distribute-patterns"))) void *memcpy(void *to, const void *from, size_t len)
{
    char *into = to;
    for (size_t at = 0; at < len; at++)
        into[at] = ((const char *)from)[at];
    return into + table[(len & 63) * WORDS];
}

static unsigned long word(size_t at)
{
    return at * 0x9e3779b97f4a7c15ul >> (at % 40);
}

int main(void)
{
    volatile unsigned long *words = malloc(PAGES * WORDS * sizeof(*words));
    for (size_t at = 0; at < PAGES * WORDS; at++)
        words[at] = word(at);
    for (int round = 0; round < 4; round++)
        for (size_t at = 0; at < PAGES * WORDS; at++)
            if (words[at] != word(at)) {
                printf("word %zu differs in round %d: %#lx\n", at, round, words[at]);
                return 1;
            }
    return 0;
}
