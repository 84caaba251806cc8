//! Progress: whether reclaim gets anywhere, and how long it rests where it does not.

/// Batches in a row that free nothing before growth stops waiting.
const STUCK_BATCHES: u32 = 8;
/// The first rest of reclaim that is stuck, ns; each further one is twice as long, ...
const REST_NS: u64 = 1_000_000;
/// ... up to so many doublings.
const DOUBLINGS: u32 = 6;

/// Batches that freed nothing. Everything may be pinned, incompressible or shared.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    idle_batches: u32,
}

impl Progress {
    /// A batch is over. How long to rest, ns, if reclaim is stuck.
    ///
    /// ```
    /// use spmem_core::reclaim::Progress;
    /// let mut progress = Progress::default();
    /// assert!((0..7).all(|_| progress.note(0).is_none()));
    /// assert_eq!(progress.note(0), Some(1_000_000));
    /// assert_eq!(progress.note(0), Some(2_000_000));
    /// assert_eq!(progress.note(1), None);
    /// assert!(!progress.is_stuck());
    /// ```
    pub fn note(&mut self, done_pages: u64) -> Option<u64> {
        self.idle_batches = if done_pages == 0 { self.idle_batches.saturating_add(1) } else { 0 };
        self.is_stuck().then(|| REST_NS << (self.idle_batches - STUCK_BATCHES).min(DOUBLINGS))
    }

    /// Whether nothing could leave for so long that growth is not to wait for it.
    pub const fn is_stuck(&self) -> bool {
        self.idle_batches >= STUCK_BATCHES
    }
}
