//! Readahead: how many pages come back along with one that was asked for.
//!
//! A fault for the page behind the last one that came back continues a stream, and doubles its window, as mm/readahead.c
//! ramps up; any other fault begins a stream with a window of one page. Several streams are told apart, because threads
//! interleave theirs. Nothing comes along where there is no room for it: what was asked for does.
//! Pure. Called by the runtime's fault line and the simulator. Hole: only upwards, and only with stride one.

/// The largest window, pages.
pub const WINDOW_MAX: u32 = 32;
/// Streams told apart.
const STREAMS: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The page that continues it.
    next: u64,
    window: u32,
}

/// The streams of one process. Pages go by number: address divided by the size of a page.
#[derive(Clone, Debug)]
pub struct Readahead {
    streams: [Stream; STREAMS],
    /// The stream that was begun last.
    newest: usize,
}

impl Default for Readahead {
    fn default() -> Self {
        Self { streams: [Stream { next: u64::MAX, window: 0 }; STREAMS], newest: 0 }
    }
}

impl Readahead {
    /// How many pages to bring from `page` on: 1 to [`WINDOW_MAX`], and one more than `room_pages` at most.
    ///
    /// ```
    /// use spmem_core::readahead::Readahead;
    /// let mut readahead = Readahead::default();
    /// assert_eq!(readahead.window(70, 1000), 1);
    /// readahead.advance(70, 1);
    /// assert_eq!(readahead.window(71, 1000), 2);
    /// assert_eq!(readahead.window(500, 1000), 1);
    /// readahead.advance(71, 2);
    /// assert_eq!(readahead.window(73, -5), 1);
    /// ```
    pub fn window(&mut self, page: u64, room_pages: i64) -> u32 {
        let window = if let Some(stream) = self.find(page) {
            stream.window = (stream.window * 2).min(WINDOW_MAX);
            stream.window
        } else {
            self.newest = (self.newest + 1) % STREAMS;
            self.streams[self.newest] = Stream { next: page, window: 1 };
            1
        };
        window.min(u32::try_from(room_pages.max(1)).unwrap_or(u32::MAX))
    }

    /// `count` pages from `page` on are there: the stream goes on behind them.
    pub fn advance(&mut self, page: u64, count: u32) {
        if let Some(stream) = self.find(page) {
            stream.next = page + u64::from(count);
        }
    }

    fn find(&mut self, page: u64) -> Option<&mut Stream> {
        self.streams.iter_mut().find(|stream| stream.next == page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_interleaved_streams_as_are_told_apart_each_reach_the_largest_window() {
        let mut readahead = Readahead::default();
        let mut at: [u64; STREAMS] = core::array::from_fn(|stream| stream as u64 * 1_000_000);
        for _ in 0..8 {
            for page in &mut at {
                let window = readahead.window(*page, i64::MAX);
                readahead.advance(*page, window);
                *page += u64::from(window);
            }
        }
        assert!(at.iter().all(|&page| readahead.window(page, i64::MAX) == WINDOW_MAX));
    }

    #[test]
    fn without_room_a_fault_brings_its_page_only() {
        let mut readahead = Readahead::default();
        for page in 0..100 {
            assert_eq!(readahead.window(page, 0), 1);
            readahead.advance(page, 1);
        }
    }

    #[test]
    fn a_stream_whose_pages_did_not_come_is_asked_for_again_at_the_same_place() {
        let mut readahead = Readahead::default();
        readahead.window(10, 100);
        readahead.advance(11, 1); // not where a stream is
        assert_eq!(readahead.window(10, 100), 2);
    }
}
