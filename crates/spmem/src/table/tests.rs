extern crate std;
use super::*;

#[test]
fn an_entry_keeps_what_it_was_made_of() {
    for copy in [Copy::None, Copy::Holding(u32::MAX), Copy::Stored(PAYLOAD)] {
        for age in 0..8 {
            let age = Age::from_bits(age);
            for entry in [Entry::away(copy, age), Entry::present(copy, age)] {
                assert_eq!((entry.copy(), entry.age().bits()), (copy, age.bits()));
                assert!(!entry.is_discarded());
            }
            assert!(Entry::away(copy, age).is_away() && !Entry::present(copy, age).is_away());
        }
    }
    for target in 0..MAX_TARGETS {
        let placed = Entry::placed(target, Age::HOTTEST);
        assert_eq!((placed.target(), placed.age(), placed.copy()), (Some(target), Age::HOTTEST, Copy::None));
        assert!(!placed.is_away() && !placed.is_empty() && !placed.is_discarded() && !placed.is_refused());
    }
    assert!(Entry::away(Copy::Stored(PAYLOAD), Age::HOTTEST).target().is_none());
    assert!(!Entry::discarded().is_away() && Entry::discarded().copy() == Copy::None);
}

#[test]
fn chunks_are_found_by_any_address_inside_and_in_order() {
    let mut table = Table::new();
    let starts = [3 * CHUNK, 5 * CHUNK, 7 << 40, (1 << 47) - CHUNK];
    for start in starts {
        table.find_or_add(start + 77);
        table.set(start, Entry::away(Copy::Stored(1), Age::COLDEST));
    }
    assert_eq!(table.chunks_in(0, 1 << 47).collect::<Vec<_>>(), starts);
    assert_eq!(table.chunks_in(5 * CHUNK + 9, 5 * CHUNK + 10).collect::<Vec<_>>(), [5 * CHUNK]);
    assert_eq!(table.chunks_in(5 * CHUNK + 9, 5 * CHUNK + 9).next(), None, "an empty range has no chunk");
    assert!(table.get(starts[2] + 1).is_away() && table.get(starts[2] + PAGE).is_empty());
    assert_eq!(table.find(starts[3]).map(|chunk| chunk.away), Some(1));
}

#[test]
fn a_quiet_time_adds_what_was_laid_by_and_gives_the_rest_back() {
    let mut table = Table::new();
    table.quieten();
    let (capacity, before) = (table.chunks.capacity(), table.metadata_bytes());
    for number in 0..QUIET_SPARES[0] {
        // Eight chunks in each of eight leaves, of two branches.
        let leaf = (number / 8 % 4 + number / 32 * BRANCH) * CHUNK * LEAF;
        let chunk = leaf + number % 8 * CHUNK;
        table.find_or_add(chunk);
        for page in (chunk..chunk + CHUNK).step_by(PAGE) {
            table.set(page, Entry::away(Copy::Stored(1), Age::COLDEST));
        }
    }
    assert_eq!((table.chunks.capacity(), table.metadata_bytes()), (capacity, before));
    let Spare { chunks, rows, leaves, branches } = &table.spare;
    assert_eq!(
        [chunks.len(), rows.len(), leaves.len(), branches.len()],
        [0; 4],
        "nothing but the spares was used"
    );
    table.end_quiet();
    table.quieten();
    table.end_quiet();
    assert_eq!(table.metadata_bytes(), before, "spares are given back");
    assert_eq!(table.chunks_in(0, ADDRESS_END).count(), QUIET_SPARES[0]);
}

#[test]
fn a_table_tells_of_each_page_what_it_was_told_last() {
    let mut table = Table::new();
    let entries = |n: u64| match n % 6 {
        4 => Entry::placed((n / 6) as usize % MAX_TARGETS, Age::COLDEST),
        0 => Entry::default(),
        1 => Entry::discarded(),
        2 => Entry::refused(Copy::Stored(n)),
        3 => Entry::present(Copy::Holding(n as u32), Age::COLDEST),
        _ => Entry::away(Copy::Stored(n), Age::COLDEST),
    };
    let mut told = std::collections::BTreeMap::new();
    let mut random = 1_u64;
    for n in 0..40_000 {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(n);
        let page = (random >> 40) as usize % (3 * CHUNK_PAGES) * PAGE;
        table.find_or_add(page);
        let old = table.set(page, entries(random >> 20));
        assert!(old == told.insert(page, entries(random >> 20)).unwrap_or_default());
    }
    for recounted in [false, true] {
        for chunk in [0, CHUNK, 2 * CHUNK] {
            let of = |is: fn(Entry) -> bool| told.range(chunk..chunk + CHUNK).filter(|told| is(*told.1)).count();
            let found = table.find(chunk).expect("pages were told of");
            assert!((chunk..chunk + CHUNK).step_by(PAGE).all(|page| found.get(page) == told[&page]));
            let counts = [found.away, found.kept, found.refused].map(|count| count as usize);
            assert_eq!(counts, [of(Entry::is_away), of(is_kept), of(Entry::is_refused)]);
        }
        let placed: [u64; MAX_TARGETS] =
            core::array::from_fn(|at| told.values().filter(|entry| entry.target() == Some(at)).count() as u64);
        assert!(placed == table.count_placed() && placed.iter().all(|&count| count > 0), "{placed:?}");
        if !recounted {
            table.recount();
        }
    }
}

/// Bits and words lie on different pages, which a fork copies one after the other.
#[test]
fn a_word_that_is_older_than_its_bit_is_not_counted() {
    let mut table = Table::new();
    table.find_or_add(0);
    for page in [0, PAGE] {
        table.set(page, Entry::away(Copy::Stored(1), Age::COLDEST));
    }
    table.chunks[0].discarded[0] |= 1;
    table.recount();
    assert!(table.get(0).is_discarded() && table.get(PAGE).is_away());
    assert_eq!(table.find(0).map(|chunk| chunk.away), Some(1));
    table.set(0, Entry::default());
    table.set(PAGE, Entry::default());
    assert_eq!(table.find(0).map(|chunk| chunk.away), Some(0));
}

#[test]
fn a_page_here_and_there_takes_a_row_and_a_discarded_one_none() {
    let mut table = Table::new();
    let gib = |table: &mut Table| {
        for chunk in 0..512 {
            table.find_or_add(chunk * CHUNK);
        }
        table.metadata_bytes()
    };
    let empty = gib(&mut table);
    for page in (0..512 * CHUNK).step_by(PAGE) {
        table.set(page, Entry::discarded());
    }
    assert_eq!(table.metadata_bytes(), empty, "discarded pages have no word");
    for chunk in 0..512 {
        table.set(chunk * CHUNK + 9 * PAGE, Entry::away(Copy::Stored(1), Age::COLDEST));
    }
    let a_page = table.metadata_bytes() / 512;
    assert!(a_page < 800, "{a_page} bytes for a page of each chunk");
}

#[test]
fn registered_runs_are_what_was_registered() {
    let mut chunk = Chunk::new(CHUNK);
    chunk.set_registered(CHUNK + 3 * PAGE, CHUNK + 70 * PAGE, true);
    chunk.set_registered(CHUNK + 10 * PAGE, CHUNK + 11 * PAGE, false);
    let runs: Vec<_> = chunk.registered_runs().map(|(a, b)| ((a - CHUNK) / PAGE, (b - CHUNK) / PAGE)).collect();
    assert_eq!(runs, [(3, 10), (11, 70)]);
    assert!(chunk.is_registered(CHUNK + 11 * PAGE, CHUNK + 70 * PAGE));
    assert!(!chunk.is_registered(CHUNK + 9 * PAGE, CHUNK + 12 * PAGE));
}
