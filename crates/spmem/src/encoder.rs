//! The encoder: a thread of `spm` that reads pages of a managed process, compresses them and hands the encodings back.
//!
//! Why another process: each time a page leaves, the kernel makes the processors that run the process forget where it
//! was (TLB shoot-down), and waits for them. A compressing thread of the process itself would be one of them, and the
//! dearest. Where the encoder works, the process runs on as few processors as its own threads need (ADR 10).
//!
//! An [`Exchange`] is memory that both map. It has lanes; each goes round: the agent fills in addresses and posts it
//! ([`Client::post`]), the encoder reads the pages (/proc/PID/mem, which the agent has opened: nobody gets more by it than he has), writes what became of them and says so
//! ([`serve`]), the agent takes it ([`Client::take`]). An answer is held against the page before that page's RAM is
//! given up (R19). The pages are in slots of the holding area that are `Busy`, so
//! they do not change meanwhile. Nothing depends on an answer: a lane whose answer does not come stays out of use, and
//! the agent encodes by itself.

use crate::dense::DenseLane;
use crate::follow::{Home, Shadow};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed};
use spmem_core::reclaim::{ENCODER_IDLE_NS, Spin, answer_sleep_ns};
use spmem_node::compressed::{Codec, Label, Verified};
use spmem_node::{Page, Stage, Unfit};
use spmem_sys::fd::Fd;
use spmem_sys::futex::Event;
use spmem_sys::{PAGE, clock, process, thread};

/// Pages of a lane.
pub const LANE_PAGES: usize = 16;
/// One is encoded while the other is taken and filled.
pub const LANES: usize = 2;

/// Nice value of an encoder that encodes: as urgent as the handler, as the program waits for what it has not done.
const URGENT: i32 = -10;

/// States of a lane; it is free in any other.
const POSTED: u32 = 1;
const DONE: u32 = 2;

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was not read: the agent has to see to it.
    Unread,
    /// Encoded, read back and compared.
    Encoded(Label),
    /// It cannot be stored (R19).
    Unfit(Unfit),
}

const UNREAD: u32 = 0;
const ENCODED: u32 = 1;
const INCOMPRESSIBLE: u32 = 2;
const NOT_REPRODUCED: u32 = 3;

/// What agent and encoder share. Atomics only: zeroed memory is a valid value, and any other as well.
#[repr(C)]
pub struct Exchange {
    posted: Event<true>,
    /// Where the handler of the process is bound.
    home: Home,
    lanes: [Lane; LANES],
    /// See [`crate::dense`].
    pub(crate) dense: DenseLane,
}

#[repr(C, align(64))]
struct Lane {
    state: AtomicU32,
    count: AtomicU32,
    done: Event<true>,
    pages: [Item; LANE_PAGES],
    bytes: [[AtomicU64; PAGE / 8]; LANE_PAGES],
}

#[repr(C)]
struct Item {
    /// Of the page; 0: leave it.
    address: AtomicU64,
    kind: AtomicU32,
    len: AtomicU32,
    word: AtomicU64,
}

impl Exchange {
    /// Wakes the threads that serve it, to look at their orders.
    pub fn wake(&self) {
        self.posted.signal();
        self.dense.posted.signal();
    }
}

impl Item {
    fn answer(&self, answer: Answer) {
        let (kind, len, word) = match answer {
            Answer::Unread => (UNREAD, 0, 0),
            Answer::Encoded(label) => (ENCODED, label.len, label.word),
            Answer::Unfit(Unfit::Incompressible { encoded, limit }) => (INCOMPRESSIBLE, encoded, limit as u64),
            Answer::Unfit(Unfit::NotReproduced) => (NOT_REPRODUCED, 0, 0),
        };
        self.kind.store(kind, Relaxed);
        self.len.store(u32::try_from(len).unwrap_or(u32::MAX), Relaxed);
        self.word.store(word, Relaxed);
    }

    fn answered(&self) -> Answer {
        let (len, word) = (self.len.load(Relaxed) as usize, self.word.load(Relaxed));
        match self.kind.load(Relaxed) {
            ENCODED => Answer::Encoded(Label { len, word }),
            INCOMPRESSIBLE => Answer::Unfit(Unfit::Incompressible { encoded: len, limit: word as usize }),
            NOT_REPRODUCED => Answer::Unfit(Unfit::NotReproduced),
            _ => Answer::Unread,
        }
    }
}

/// Encodes for the process whose /proc/PID/mem `memory` is, until `is_over`; the encoder's thread.
pub fn serve(exchange: &Exchange, codec: Codec, memory: &Fd, is_over: &AtomicBool) {
    let mut workspace = codec.workspace();
    let mut pages = alloc::vec![0_u8; LANE_PAGES * PAGE];
    let mut next = 0;
    let mut spin = Spin::new();
    let mut shadow = Shadow::new();
    let nice = thread::nice();
    // Whoever is on the other processors goes before one that gives way to most: the scheduler knows a better place.
    let gives_way = nice > 0;
    loop {
        shadow.avoid(exchange.home.get().filter(|_| !gives_way));
        let lane = &exchange.lanes[next];
        let ticket = exchange.posted.ticket();
        // Acquire pairs with the Release in `Client::post`.
        if lane.state.load(Ordering::Acquire) == POSTED {
            thread::set_nice(URGENT.min(nice));
            lane.encode(&codec, &mut workspace, &mut pages, memory);
            thread::set_nice(nice);
            // Release: whoever sees it done sees the encodings.
            lane.state.store(DONE, Ordering::Release);
            lane.done.signal();
            next = (next + 1) % LANES;
            continue;
        }
        if is_over.load(Relaxed) {
            return;
        }
        let since = clock::now_ns();
        let is_posted = || lane.state.load(Relaxed) == POSTED;
        let mut now = since;
        while !is_posted() && spin.goes_on(now - since) {
            // Whoever else has work for this processor goes first.
            process::give_way();
            let before = core::mem::replace(&mut now, clock::now_ns());
            spin.gave_way(now - before);
        }
        if !is_posted() {
            exchange.posted.wait(ticket, Some(ENCODER_IDLE_NS));
            spin.woken(clock::now_ns() - since);
        }
    }
}

impl Lane {
    fn encode(&self, codec: &Codec, workspace: &mut <Codec as Stage>::Workspace, pages: &mut [u8], memory: &Fd) {
        let count = (self.count.load(Relaxed) as usize).min(LANE_PAGES);
        let mut addresses = [0; LANE_PAGES];
        let mut wanted = 0;
        for item in &self.pages[..count] {
            item.answer(Answer::Unread);
            if item.address.load(Relaxed) != 0 {
                addresses[wanted] = item.address.load(Relaxed) as usize;
                wanted += 1;
            }
        }
        let read = process::read_pages(memory, &addresses[..wanted], pages);
        let items = self.pages[..count].iter().zip(&self.bytes);
        let items = items.filter(|(item, _)| item.address.load(Relaxed) != 0);
        let (pages, _) = pages.as_chunks::<PAGE>();
        for ((item, bytes), page) in items.zip(&pages[..read]) {
            let page: &Page = page;
            item.answer(match codec.stage(page, workspace) {
                Ok(verified) => {
                    let (label, encoding) = verified.to_parcel();
                    put(bytes, encoding);
                    Answer::Encoded(label)
                }
                Err(unfit) => Answer::Unfit(unfit),
            });
        }
    }
}

pub(crate) fn put(words: &[AtomicU64], bytes: &[u8]) {
    let (whole, rest) = bytes.as_chunks::<8>();
    for (word, bytes) in words.iter().zip(whole) {
        word.store(u64::from_ne_bytes(*bytes), Relaxed);
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    if let Some(word) = words.get(whole.len()) {
        word.store(u64::from_ne_bytes(last), Relaxed);
    }
}

/// The agent's side: one reclaimer's.
pub(crate) struct Client {
    exchange: &'static Exchange,
    /// Lane to post next; the oldest one that is out is `next - out`.
    next: usize,
    out: usize,
    bytes: alloc::boxed::Box<Page>,
}

impl Client {
    pub(crate) fn new(exchange: &'static Exchange) -> Self {
        Self { exchange, next: 0, out: 0, bytes: alloc::boxed::Box::new([0; PAGE]) }
    }

    /// Whether a lane is free.
    pub(crate) fn has_room(&self) -> bool {
        self.out < LANES && self.exchange.lanes[self.next].state.load(Ordering::Acquire) != POSTED
    }

    /// Has these pages encoded, on any processor but `home`; 0 stands for one that is not to be.
    pub(crate) fn post(&mut self, addresses: impl Iterator<Item = usize>, home: Option<usize>) {
        self.exchange.home.set(home);
        let lane = &self.exchange.lanes[self.next];
        let mut count = 0;
        for (item, address) in lane.pages.iter().zip(addresses) {
            item.address.store(address as u64, Relaxed);
            count += 1;
        }
        lane.count.store(count, Relaxed);
        // Release: the encoder that sees it posted sees the addresses.
        lane.state.store(POSTED, Ordering::Release);
        self.exchange.posted.signal();
        self.next = (self.next + 1) % LANES;
        self.out += 1;
    }

    /// Number of the oldest lane that is out.
    pub(crate) fn oldest(&self) -> Option<usize> {
        (self.out > 0).then_some((self.next + LANES - self.out) % LANES)
    }

    /// Whether the oldest lane is done.
    pub(crate) fn is_done(&self) -> bool {
        self.oldest().is_some_and(|lane| self.exchange.lanes[lane].state.load(Ordering::Acquire) == DONE)
    }

    /// Waits until the oldest lane is done; whether it is. If not, the agent works by itself until an answer comes.
    pub(crate) fn wait(&self) -> bool {
        let Some(oldest) = self.oldest() else { return false };
        let lane = &self.exchange.lanes[oldest];
        let since = clock::now_ns();
        loop {
            let ticket = lane.done.ticket();
            if self.is_done() {
                return true;
            }
            let Some(sleep_ns) = answer_sleep_ns(clock::now_ns() - since) else { return false };
            lane.done.wait(ticket, Some(sleep_ns));
        }
    }

    /// The oldest lane is dealt with.
    pub(crate) fn retire(&mut self) {
        self.out -= 1;
    }

    /// Whether the encoder could read none of the pages of a lane that is done.
    pub(crate) fn is_useless(&self, lane: usize) -> bool {
        let lane = &self.exchange.lanes[lane];
        let wanted = || lane.pages.iter().take(lane.count.load(Relaxed) as usize);
        let mut asked = wanted().filter(|item| item.address.load(Relaxed) != 0).peekable();
        asked.peek().is_some() && asked.all(|item| item.answered() == Answer::Unread)
    }

    /// What became of page `index` of a lane that is done.
    pub(crate) fn answer(&self, lane: usize, index: usize) -> Answer {
        self.exchange.lanes[lane].pages[index].answered()
    }

    /// What a lane that is done says to be `page`, encoded.
    pub(crate) fn take(
        &mut self,
        codec: &Codec,
        (lane, index): (usize, usize),
        label: Label,
        page: &Page,
    ) -> Option<Verified<'_>> {
        let words = &self.exchange.lanes[lane].bytes[index];
        let (bytes, _) = self.bytes.as_chunks_mut::<8>();
        for (bytes, word) in bytes.iter_mut().zip(words).take(label.len.div_ceil(8)) {
            *bytes = word.load(Relaxed).to_ne_bytes();
        }
        Verified::from_parcel(codec, label, &self.bytes[..], page)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    extern crate std;
    use super::*;
    use alloc::boxed::Box;
    use alloc::vec::Vec;
    use spmem_sys::thread::Affinity;

    pub(crate) fn exchange() -> &'static Exchange {
        let item = || Item {
            address: AtomicU64::new(0),
            kind: AtomicU32::new(0),
            len: AtomicU32::new(0),
            word: AtomicU64::new(0),
        };
        let lane = || Lane {
            state: AtomicU32::new(0),
            count: AtomicU32::new(0),
            done: Event::new(),
            pages: core::array::from_fn(|_| item()),
            bytes: [const { [const { AtomicU64::new(0) }; PAGE / 8] }; LANE_PAGES],
        };
        let lanes = core::array::from_fn(|_| lane());
        Box::leak(Box::new(Exchange {
            posted: Event::new(),
            home: Home::nowhere(),
            lanes,
            dense: DenseLane::new(),
        }))
    }

    fn memory() -> Fd {
        Fd::open(c"/proc/self/mem", libc::O_RDONLY).expect("/proc")
    }

    /// Page 0 compresses, 1 is same-filled, 2 is noise.
    fn pages() -> Vec<Page> {
        let text = core::array::from_fn(|index| (index / 50) as u8);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let noise = core::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        });
        alloc::vec![text, [7; PAGE], noise]
    }

    #[test]
    fn every_page_comes_back_as_this_process_would_have_encoded_it() {
        let (exchange, pages, codec) = (exchange(), pages(), Codec::new(5));
        let is_over: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let encoder = std::thread::spawn(move || serve(exchange, codec, &memory(), is_over));
        let mut client = Client::new(exchange);
        let mut workspace = codec.workspace();
        for round in 0..50 {
            let address = |page: &Page| page.as_ptr().expose_provenance();
            let addresses = [address(&pages[0]), 0, address(&pages[1]), address(&pages[2]), 0];
            // Wherever the handler is, and goes meanwhile.
            let home = (round % 3_usize).checked_sub(1);
            while client.has_room() {
                client.post(addresses.into_iter(), home);
            }
            assert!(client.wait(), "round {round}");
            let lane = client.oldest().expect("two are out");
            for (index, page) in [(0, &pages[0]), (2, &pages[1])] {
                let Answer::Encoded(label) = client.answer(lane, index) else { panic!("page {index}") };
                let parcel = codec.stage(page, &mut workspace).expect("it compresses").to_parcel();
                let taken = client.take(&codec, (lane, index), label, page).expect("of this codec");
                assert_eq!(taken.to_parcel(), parcel);
                // R19: right of another page is wrong.
                assert!(client.take(&codec, (lane, index), label, &pages[2]).is_none(), "round {round}");
            }
            assert!(matches!(client.answer(lane, 3), Answer::Unfit(Unfit::Incompressible { .. })));
            assert_eq!((client.answer(lane, 1), client.answer(lane, 4)), (Answer::Unread, Answer::Unread));
            client.retire();
        }
        is_over.store(true, Relaxed);
        exchange.wake();
        encoder.join().expect("the encoder");
    }

    #[test]
    fn an_encoder_keeps_off_the_home_unless_it_gives_way_to_most() {
        let check = |nice| {
            thread::set_nice(nice);
            let before = Affinity::of_caller();
            let Some(home) = (0..1024).find(|&cpu| before.contains(cpu)).filter(|_| before.count() > 1) else {
                return;
            };
            let exchange = exchange();
            exchange.home.set(Some(home));
            serve(exchange, Codec::new(5), &memory(), &AtomicBool::new(true));
            assert_eq!(Affinity::of_caller().contains(home), thread::nice() > 0);
        };
        for nice in [0, 1] {
            std::thread::spawn(move || check(nice)).join().expect("a thread");
        }
    }

    #[test]
    fn pages_that_cannot_be_read_are_left_to_the_agent() {
        let exchange = exchange();
        let pages = pages();
        let codec = Codec::new(5);
        let mut client = Client::new(exchange);
        client.post(
            [pages[0].as_ptr().expose_provenance(), PAGE, pages[1].as_ptr().expose_provenance()].into_iter(),
            None,
        );
        let lane = &exchange.lanes[0];
        lane.encode(&codec, &mut codec.workspace(), &mut alloc::vec![0; LANE_PAGES * PAGE], &memory());
        assert!(matches!(client.answer(0, 0), Answer::Encoded(_)));
        assert_eq!((client.answer(0, 1), client.answer(0, 2)), (Answer::Unread, Answer::Unread));
        assert!(!client.is_useless(0));
        client.post([0, PAGE].into_iter(), None);
        let lane = &exchange.lanes[1];
        lane.encode(&codec, &mut codec.workspace(), &mut alloc::vec![0; LANE_PAGES * PAGE], &memory());
        assert!(client.is_useless(1));
    }

    #[test]
    fn without_an_encoder_the_agent_goes_on() {
        let mut client = Client::new(exchange());
        client.post([PAGE].into_iter(), None);
        assert!(!client.wait());
        client.retire();
        client.post([PAGE].into_iter(), None);
        client.retire();
        assert!(!client.has_room(), "lanes that are out stay out of use");
    }
}
