//! Claims about what a fault is to a trace.

extern crate std;
use super::*;
use crate::control::tests::control;
use crate::holding::Holding;
use crate::recorder::{Reader, Record};
use crate::space::tests::space;
use alloc::boxed::Box;
use spmem_core::lru::Age;
use spmem_node::compressed::Codec;
use spmem_node::{Backend, Page, Stage};
use spmem_sys::uffd::feature;

/// What was recorded since the last time: what happened, and how many pages came.
fn recorded(runtime: &Runtime, reader: &mut Reader) -> Option<(Happening, u64)> {
    let next = reader.next(&runtime.shared().recorder, process::now_ns());
    next.map(|Record { what, value, .. }| (what, value & !IS_WRITE))
}

#[test]
fn a_fault_is_recorded_if_a_page_comes_with_it_and_not_where_another_threads_brought_it() {
    let uffd = Uffd::from_syscall().and_then(|uffd| uffd.enable(feature::SCRATCH).map(|_| uffd));
    let Ok(uffd) = uffd else {
        std::println!("skipped: no userfaultfd with MOVE here");
        return;
    };
    let runtime: &'static Runtime = Box::leak(Box::new(Runtime::with_control(Box::leak(control()))));
    runtime.uffd.store(uffd.raw(), Relaxed);
    runtime.shared().recorder.switch_on();
    // In one chunk.
    let memory = Mapping::aligned(4 * PAGE, 4 * PAGE, c"spmem test").expect("mmap");
    uffd.register(memory.start(), memory.len()).expect("register");
    let (mut space, mut reader) = (space(1), Reader::default());
    let mut server = Server::new(runtime).expect("mmap");
    let (touched, stored) = (memory.start(), memory.start() + PAGE);
    space.table.find_or_add(touched);
    let codec = Codec::new(1);
    let bytes: Page = core::array::from_fn(|at| (at / 100) as u8);
    let mut workspace = codec.workspace();
    let handle = space.store.store(&codec.stage(&bytes, &mut workspace).expect("it compresses"));
    let handle = handle.expect("there is room").raw();
    space.table.set(stored, Entry::away(Copy::Stored(handle), Age::COLDEST));
    let (slot, held) = (memory.start() + 2 * PAGE, memory.start() + 3 * PAGE);
    assert_eq!(uffd.copy(slot, &bytes).stopped, None);
    space.holding = Holding::new(slot, 1);
    let in_slot = Entry::away(Copy::Holding(space.holding.push(held, None)), Age::COLDEST);
    space.table.set(held, in_slot);
    let mut serve = |space: &mut Space<Cram>, address, kind, was_away| {
        let fault = Waiting { address, kind, tid: 1, was_away, since_ns: 0 };
        assert!(server.try_serve(space, &uffd, fault, 1));
        recorded(runtime, &mut reader)
    };
    // The second of each is told of as the kernel queued it before the page had come.
    assert_eq!(serve(&mut space, touched, Fault::Write, false), Some((Happening::FaultNowhere, 1)));
    assert_eq!(serve(&mut space, touched + 5, Fault::Write, false), None);
    assert_eq!(serve(&mut space, touched + 9, Fault::Read, false), None);
    assert_eq!(serve(&mut space, stored, Fault::Read, true), Some((Happening::FaultNode, 1)));
    assert_eq!(serve(&mut space, stored, Fault::Read, true), None);
    assert_eq!(serve(&mut space, stored, Fault::Write, false), None);
    // It was behind a fence, and another thread's write has brought it up.
    assert_eq!(serve(&mut space, stored, Fault::Fenced, false), None);
    assert_eq!(memory.bytes(PAGE, PAGE), bytes, "every byte");
    assert!(memory.bytes(0, PAGE).iter().all(|&byte| byte == 0));
    assert_eq!(serve(&mut space, held, Fault::Write, true), Some((Happening::FaultHolding, 1)));
    assert_eq!(serve(&mut space, held, Fault::Write, true), None);
    // While a fork is under way entries say `away` of pages that have come: so does the second thread's fault.
    space.table.set(stored, Entry::away(Copy::Stored(handle), Age::COLDEST));
    space.table.set(held, in_slot);
    space.mode = Mode::Quiet;
    assert_eq!(serve(&mut space, stored, Fault::Read, true), None);
    assert_eq!(serve(&mut space, held, Fault::Write, true), None);
    for at in [1, 3] {
        assert_eq!(memory.bytes(at * PAGE, PAGE), bytes, "every byte of page {at}");
    }
}
