//! What a line of 64 bytes comes to by base-delta-immediate compression: a base and small differences from it, as devices that
//! compress between cache and memory do (Pekhimenko et al., PACT 2012, table 2).

/// Bytes of a line.
pub const LINE_BYTES: usize = 64;
/// Base and difference in bytes; the line comes to the base and a difference for each value.
const FORMS: [(usize, usize); 6] = [(8, 1), (4, 1), (8, 2), (2, 1), (4, 2), (8, 4)];

/// What a line comes to, bytes: 1 for zeros, 8 for one value, else the best form, or all 64.
///
/// ```
/// use spmem_node::model::lines::line_bytes;
/// assert_eq!((line_bytes(&[0; 64]), line_bytes(&[7; 64])), (1, 8));
/// let mut pointers = [0; 64];
/// for (index, word) in pointers.as_chunks_mut::<8>().0.iter_mut().enumerate() {
///     *word = (0x7fff_0000_1000 + 8 * index as u64).to_le_bytes();
/// }
/// assert_eq!(line_bytes(&pointers), 8 + 8);
/// ```
pub fn line_bytes(line: &[u8; LINE_BYTES]) -> usize {
    if *line == [0; LINE_BYTES] {
        return 1;
    }
    if line.chunks_exact(8).all(|word| word == &line[..8]) {
        return 8;
    }
    let fitting = FORMS.iter().filter(|&&(base, delta)| fits(line, base, delta));
    fitting.map(|&(base, delta)| base + LINE_BYTES / base * delta).min().unwrap_or(LINE_BYTES)
}

/// Whether every value of `size` bytes is within a signed difference of `delta` bytes from the first.
fn fits(line: &[u8; LINE_BYTES], size: usize, delta: usize) -> bool {
    let value = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..size].copy_from_slice(bytes);
        i64::from_le_bytes(word)
    };
    let base = value(&line[..size]);
    // In the arithmetic of the value's own width.
    let unused = 64 - 8 * size;
    let most = 1_i64 << (8 * delta - 1);
    line.chunks_exact(size).all(|bytes| {
        let difference = value(bytes).wrapping_sub(base) << unused >> unused;
        (-most..most).contains(&difference)
    })
}

/// What a granule comes to, bytes: its lines together, in whole sectors, never more than it has.
pub fn granule_bytes(granule: &[u8], sector: usize) -> usize {
    let lines = granule.as_chunks::<LINE_BYTES>().0;
    let bytes: usize = lines.iter().map(line_bytes).sum();
    bytes.next_multiple_of(sector).min(granule.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line<const N: usize>(values: impl Iterator<Item = [u8; N]>) -> [u8; LINE_BYTES] {
        let mut line = [0; LINE_BYTES];
        for (at, value) in line.as_chunks_mut::<N>().0.iter_mut().zip(values) {
            *at = value;
        }
        line
    }

    #[test]
    fn each_form_is_found_at_its_bounds_and_not_beyond() {
        let around = |delta: i64| (0..).map(move |at| (1 << 40) + if at % 2 == 0 { 0 } else { delta });
        for (delta, bytes) in
            [(127, 16), (-128, 16), (128, 24), (-32768, 24), (32768, 40), (i64::from(i32::MAX), 40), (1 << 31, 64)]
        {
            assert_eq!(line_bytes(&line(around(delta).map(i64::to_le_bytes))), bytes, "{delta}");
        }
        let small = (0..).map(|at: u32| (0x0102_0000 + at % 7).to_le_bytes());
        assert_eq!(line_bytes(&line(small)), 4 + 16);
        let shorts = (0..).map(|at: u16| (0x4000 + at * 5 % 100).to_le_bytes());
        assert_eq!(line_bytes(&line(shorts)), 2 + 32);
        let around_zero =
            (0..).map(|at: u16| (if at.is_multiple_of(2) { at } else { u16::MAX - at }).to_le_bytes());
        assert_eq!(line_bytes(&line(around_zero)), 2 + 32, "it wraps");
    }

    #[test]
    fn a_granule_never_takes_more_than_it_has() {
        let noise: std::vec::Vec<u8> =
            (0..1024_u32).map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[1]).collect();
        assert_eq!(granule_bytes(&noise, 64), 1024);
        assert_eq!(granule_bytes(&[0; 1024], 64), 64);
        assert_eq!(granule_bytes(&[0; 64], 8), 8);
    }
}
