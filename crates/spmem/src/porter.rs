//! The porter: a thread outside of any wall that copies pages of a managed process to memory of a mapped node.
//!
//! A process behind a wall cannot allocate on the node, and its pages are to go there all the same: by grant. So its pages
//! are copied by somebody whose cpuset has the node, into a *staging area* of the process: a few missing pages of the agent's own, registered with a
//! userfaultfd that is good for nothing else. The kernel allocates by the policy of who copies (UFFDIO_COPY). From there the agent moves them to their places
//! ([`crate::place`]), under its lock and by its own table, as it moves pages back that are touched.
//!
//! A [`Crossing`] is memory that both map; the agent posts addresses, the porter answers how many pages it has copied. Nothing
//! depends on an answer. One that comes late finds the same staging area, which nobody has used meanwhile: it is never a page of the program's.

use core::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed};
use spmem_core::placing::PLACE_PAGES;
use spmem_core::reclaim::{ENCODER_IDLE_NS, answer_sleep_ns};
use spmem_sys::fd::Fd;
use spmem_sys::futex::Event;
use spmem_sys::uffd::Uffd;
use spmem_sys::{Errno, PAGE, Result, clock, process};

/// Bytes of a staging area.
pub const STAGING_LEN: usize = PLACE_PAGES * PAGE;

/// States; free in any other.
const POSTED: u32 = 1;
const DONE: u32 = 2;

/// What agent and porter share. Atomics only: zeroed memory is a valid value, and any other as well.
#[repr(C)]
#[derive(Default)]
pub struct Crossing {
    posted: Event<true>,
    done: Event<true>,
    state: AtomicU32,
    /// 1: nobody will ask any more.
    is_over: AtomicU32,
    count: AtomicU32,
    /// Number of the node among the run's mapped ones.
    target: AtomicU32,
    /// Pages that are in the staging area, and why not more.
    copied: AtomicU32,
    errno: AtomicI32,
    pages: [AtomicU64; PLACE_PAGES],
}

/// Who lets pages through.
pub trait Desk {
    /// Before `pages` more go to a target: the wall is asked, the grant charged, the calling thread's policy set.
    ///
    /// # Errors
    /// `EDQUOT` when the grant does not reach so far, `ENOMEM` when the node has no room.
    fn admit(&mut self, target: usize, pages: usize) -> Result<()>;

    /// Called now and then while nothing is asked.
    fn rest(&mut self);
}

impl Crossing {
    /// The porter's thread ends.
    pub fn end(&self) {
        self.is_over.store(1, Relaxed);
        self.posted.signal();
    }
}

/// Copies for the process whose /proc/PID/mem `memory` is, into its staging area at `staging`, until [`Crossing::end`].
pub fn serve(crossing: &Crossing, memory: &Fd, (userfault, staging): (&Uffd, usize), desk: &mut dyn Desk) {
    let mut pages = alloc::vec![0_u8; STAGING_LEN];
    while crossing.is_over.load(Relaxed) == 0 {
        let ticket = crossing.posted.ticket();
        // Acquire pairs with the Release in `Client::post`.
        if crossing.state.load(Ordering::Acquire) == POSTED {
            let (copied, result) = copy(crossing, memory, (userfault, staging), desk, &mut pages);
            crossing.copied.store(u32::try_from(copied).unwrap_or(0), Relaxed);
            crossing.errno.store(result.map_or_else(|errno| errno.0, |()| 0), Relaxed);
            // Release: whoever sees it done sees the answer.
            crossing.state.store(DONE, Ordering::Release);
            crossing.done.signal();
        } else {
            desk.rest();
            crossing.posted.wait(ticket, Some(ENCODER_IDLE_NS));
        }
    }
}

fn copy(
    crossing: &Crossing,
    memory: &Fd,
    (userfault, staging): (&Uffd, usize),
    desk: &mut dyn Desk,
    pages: &mut [u8],
) -> (usize, Result<()>) {
    let count = (crossing.count.load(Relaxed) as usize).min(PLACE_PAGES);
    let mut addresses = [0; PLACE_PAGES];
    for (address, page) in addresses.iter_mut().zip(&crossing.pages) {
        *address = page.load(Relaxed) as usize;
    }
    if let Err(errno) = desk.admit(crossing.target.load(Relaxed) as usize, count) {
        return (0, Err(errno));
    }
    let read = process::read_pages(memory, &addresses[..count], pages);
    if read == 0 {
        return (0, Err(Errno(libc::EFAULT)));
    }
    let progress = userfault.copy(staging, &pages[..read * PAGE]);
    (progress.done / PAGE, progress.stopped.map_or(Ok(()), Err))
}

/// The agent's side.
pub(crate) struct Client {
    crossing: &'static Crossing,
    /// An answer is owed.
    is_out: bool,
}

impl Client {
    pub(crate) fn new(crossing: &'static Crossing) -> Self {
        Self { crossing, is_out: false }
    }

    /// Whether an answer is owed that was waited for in vain and has come: what was copied is nobody's.
    pub(crate) fn has_come_late(&mut self) -> bool {
        self.is_out && self.is_done() && {
            self.is_out = false;
            true
        }
    }

    /// Whether something can be posted.
    pub(crate) fn is_free(&self) -> bool {
        !self.is_out
    }

    fn is_done(&self) -> bool {
        self.crossing.state.load(Ordering::Acquire) == DONE
    }

    /// Has pages copied, and waits for the answer: how many are in the staging area, from its start, and why not all. `None` when
    /// it does not come.
    pub(crate) fn ask(&mut self, target: usize, addresses: &[usize]) -> Option<(usize, i32)> {
        let crossing = self.crossing;
        for (page, &address) in crossing.pages.iter().zip(addresses) {
            page.store(address as u64, Relaxed);
        }
        crossing.count.store(addresses.len() as u32, Relaxed);
        crossing.target.store(target as u32, Relaxed);
        // Release: the porter that sees it posted sees the addresses.
        crossing.state.store(POSTED, Ordering::Release);
        crossing.posted.signal();
        self.is_out = true;
        let since = clock::now_ns();
        loop {
            let ticket = crossing.done.ticket();
            if self.is_done() {
                self.is_out = false;
                let copied = crossing.copied.load(Relaxed) as usize;
                return Some((copied.min(addresses.len()), crossing.errno.load(Relaxed)));
            }
            let sleep_ns = answer_sleep_ns(clock::now_ns() - since)?;
            crossing.done.wait(ticket, Some(sleep_ns));
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use alloc::boxed::Box;
    use alloc::vec::Vec;
    use spmem_sys::mapping::{Mapping, discard};
    use spmem_sys::uffd::feature;

    /// Lets so many pages through.
    struct Ticket(usize);

    impl Desk for Ticket {
        fn admit(&mut self, _target: usize, pages: usize) -> Result<()> {
            self.0 = self.0.checked_sub(pages).ok_or(Errno(libc::EDQUOT))?;
            Ok(())
        }

        fn rest(&mut self) {}
    }

    #[test]
    fn pages_cross_whole_and_no_more_than_are_let_through() {
        let userfault = Uffd::from_syscall().and_then(|uffd| uffd.enable(feature::SCRATCH).map(|_| uffd));
        let Ok(userfault) = userfault else {
            std::println!("skipped: no userfaultfd with MOVE here");
            return;
        };
        let crossing: &'static Crossing = Box::leak(Box::default());
        let staging = Mapping::new(STAGING_LEN, c"spmem staging").expect("mmap");
        userfault.register(staging.start(), STAGING_LEN).expect("register");
        let at = staging.start();
        let memory = Fd::open(c"/proc/self/mem", libc::O_RDONLY).expect("/proc");
        let porter = std::thread::spawn(move || {
            serve(crossing, &memory, (&userfault, at), &mut Ticket(2 * PLACE_PAGES));
        });
        let source: Vec<[u8; PAGE]> = (0..PLACE_PAGES).map(|page| [page as u8 + 1; PAGE]).collect();
        let addresses: Vec<usize> = source.iter().map(|page| page.as_ptr().expose_provenance()).collect();
        let mut client = Client::new(crossing);
        assert_eq!(client.ask(0, &addresses), Some((PLACE_PAGES, 0)));
        for (page, bytes) in source.iter().enumerate() {
            assert_eq!(staging.bytes(page * PAGE, PAGE), bytes, "page {page}");
        }
        assert_eq!(client.ask(0, &addresses[..1]), Some((0, libc::EEXIST)), "what is there is not overwritten");
        discard(at, STAGING_LEN);
        assert_eq!(
            client.ask(0, &[addresses[3], PAGE, addresses[4]]),
            Some((1, 0)),
            "what cannot be read ends it"
        );
        assert_eq!(staging.bytes(0, PAGE), source[3]);
        discard(at, STAGING_LEN);
        assert_eq!(client.ask(0, &addresses), Some((0, libc::EDQUOT)));
        crossing.end();
        porter.join().expect("the porter");
        assert_eq!(client.ask(0, &addresses), None, "nobody answers");
        assert!(!client.is_free() && !client.has_come_late());
    }
}
