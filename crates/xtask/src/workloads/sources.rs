//! Input of the workloads: an SQL script, lines to sort, a large C++ file. The same each time.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Context;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::programs::values::sample_word;

/// A table of `rows`, two indices, and queries that read all of it and single rows of it.
pub(super) fn sql_script(rows: u32) -> String {
    format!(
        "PRAGMA temp_store = MEMORY;
CREATE TABLE item(id INTEGER PRIMARY KEY, owner INTEGER, price REAL, name TEXT, note TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
INSERT INTO item SELECT i, (i * 2654435761) % 100003, ((i * 40503) % 99991) / 4.0,
  printf('item-%08x', (i * 2246822519) % 4294967296),
  printf('order %d of customer %d, shipped on day %d', i, (i * 31) % 50021, (i * 7919) % 366) FROM n;
CREATE INDEX by_owner ON item(owner, price);
CREATE INDEX by_name ON item(name);
SELECT count(*), sum(price), min(name), max(name) FROM item;
SELECT owner, count(*), sum(price) FROM item GROUP BY owner ORDER BY 3 DESC, 1 LIMIT 20;
SELECT note FROM item WHERE owner BETWEEN 500 AND 520 ORDER BY price, id LIMIT 40;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {probes})
SELECT sum(length(note)), sum(price) FROM n JOIN item ON item.id = 1 + (n.i * 2654435761) % {rows};
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {probes})
SELECT count(*), sum(item.id) FROM n JOIN item
  ON item.name = printf('item-%08x', ((1 + (n.i * 40503) % {rows}) * 2246822519) % 4294967296);
UPDATE item SET price = price + 1.5 WHERE id % 7 = 3;
DELETE FROM item WHERE id % 11 = 5;
SELECT sum(id), sum(price), sum(length(name)) FROM item;
SELECT count(*) FROM item a JOIN item b ON a.name = b.name AND a.owner % 16 = 1;
PRAGMA integrity_check;
",
        probes = rows / 10,
    )
}

/// Lines of a log with words, numbers and addresses.
pub(super) fn write_lines(file: &Path, lines: u32) -> anyhow::Result<()> {
    let mut out = BufWriter::new(File::create(file).with_context(|| format!("cannot make {}", file.display()))?);
    let mut rng = SmallRng::seed_from_u64(11);
    for number in 0..lines {
        let (a, b, c) = (sample_word(&mut rng), sample_word(&mut rng), sample_word(&mut rng));
        let (ip, size) = (rng.random::<u16>(), rng.random_range(100..900_000_u32));
        let (x, y) = (ip >> 8, ip & 255);
        writeln!(out, "{number:08} 10.1.{x}.{y} {a}/{b}/{c}-{:05} {size} bytes", rng.random_range(0..99_999_u32))?;
    }
    out.flush().context("cannot write the lines")
}

/// Classes with containers, templates over them, and functions that use both: work for front end and optimiser.
pub(super) fn cxx_source(classes: u32) -> String {
    let mut text = String::from(
        "#include <algorithm>\n#include <functional>\n#include <iostream>\n#include <map>\n#include <memory>\n\
         #include <numeric>\n#include <sstream>\n#include <string>\n#include <tuple>\n\
         #include <unordered_map>\n#include <variant>\n#include <vector>\n\
         template <int N, class T> struct Chain { Chain<N - 1, T> next; T value{}; T sum() const { return value + next.sum(); } };\n\
         template <class T> struct Chain<0, T> { T value{}; T sum() const { return value; } };\n",
    );
    for n in 0..classes {
        let depth = 20 + n % 40;
        let _ = write!(
            text,
            "struct Record{n} {{
  int id; std::string name; std::map<std::string, std::vector<double>> rows; Chain<{depth}, std::pair<int, int>*> *link;
  std::variant<int, double, std::string, std::vector<Record{n}>> extra;
  bool operator<(const Record{n} &o) const {{ return std::tie(id, name) < std::tie(o.id, o.name); }}
}};
double work{n}(std::vector<Record{n}> &records, std::unordered_map<std::string, std::shared_ptr<Record{n}>> &index) {{
  std::sort(records.begin(), records.end(), [](auto &a, auto &b) {{ return b < a; }});
  std::stable_sort(records.begin(), records.end());
  Chain<{depth}, long> chain; std::ostringstream out; double total = chain.sum();
  for (auto &record : records) {{
    index[record.name + \"-{n}\"] = std::make_shared<Record{n}>(record);
    for (auto &[key, row] : record.rows)
      total += std::accumulate(row.begin(), row.end(), {n}.5) * static_cast<double>(key.size());
    std::visit([&](auto &value) {{ total += sizeof(value); }}, record.extra);
    out << record.id << ' ' << record.name << '\\n';
  }}
  std::function<double(double)> next = [&, total](double x) {{ return x * total + {n}; }};
  return next(static_cast<double>(out.str().size()));
}}
"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_the_same_each_time_and_grow_with_their_size() {
        assert_eq!(cxx_source(3), cxx_source(3));
        assert!(cxx_source(6).len() > cxx_source(3).len());
        assert!(sql_script(1000).contains("i < 100)"));
    }
}
