extern crate std;
use super::*;
use crate::mapping::Mapping;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

fn scratch() -> Option<Uffd> {
    let uffd = Uffd::from_syscall().ok()?;
    uffd.enable(feature::SCRATCH).ok()?;
    Some(uffd)
}

#[test]
fn a_moved_page_leaves_a_hole_and_arrives_whole() {
    let Some(uffd) = scratch() else {
        std::println!("skipped: no userfaultfd with MOVE here");
        return;
    };
    let mut from = Mapping::new(4 * PAGE, c"spmem test").expect("mmap");
    let to = Mapping::new(4 * PAGE, c"spmem test").expect("mmap");
    uffd.register(to.start(), to.len()).expect("register");
    from.bytes_mut(PAGE, 2 * PAGE).fill(9);
    let all = uffd.move_pages(to.start(), from.start(), 4 * PAGE);
    assert_eq!(all, Progress { done: 4 * PAGE, stopped: None });
    assert!(to.bytes(PAGE, 2 * PAGE).iter().all(|&b| b == 9));
    assert!(from.bytes(0, 4 * PAGE).iter().all(|&b| b == 0));
}

/// A page is touched while it moves out and in; kernels from 6.18 on then miscount.
#[test]
fn a_move_of_pages_in_use_counts_what_it_moved() {
    const PAGES: usize = 32;
    let Some(uffd) = scratch() else {
        std::println!("skipped: no userfaultfd with MOVE here");
        return;
    };
    let pagemap = Pagemap::open().expect("pagemap");
    let from = Mapping::new(PAGES * PAGE, c"spmem test").expect("mmap");
    let to = Mapping::new(PAGES * PAGE, c"spmem test").expect("mmap");
    uffd.register(to.start(), to.len()).expect("register");
    uffd.register(from.start(), from.len()).expect("register");
    for page in 0..PAGES {
        let bytes = u8::try_from(page + 1).expect("few pages");
        assert_eq!(uffd.copy(from.start() + page * PAGE, &[bytes; PAGE]).stopped, None);
    }
    let is_over = AtomicBool::new(false);
    let corrected = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Relaxed) {
                // SAFETY: only clears the accessed bits, which the next accesses set again.
                let _ = unsafe { syscall!(Sysno::madvise, from.start(), from.len(), libc::MADV_COLD) };
                for page in (0..PAGES).step_by(3) {
                    let first = from.bytes(page * PAGE, 1).as_ptr();
                    // SAFETY: in the mapping; waits until the page is back.
                    assert_eq!(usize::from(unsafe { first.read_volatile() }), page + 1);
                }
            }
        });
        let mut corrected = 0;
        for _ in 0..20_000 {
            let mut args = [to.start() as u64, from.start() as u64, (PAGES * PAGE) as u64, 0, 0];
            let said = progress(uffd.ioctl(MOVE, &mut args), args[4], PAGES * PAGE).done;
            let is_away = |page: &usize| !pagemap.is_there(from.start() + page * PAGE).expect("pagemap");
            let away = (0..PAGES).take_while(is_away).count() * PAGE;
            corrected += u32::from(said != away);
            assert!(said <= away);
            assert_eq!(uffd.move_present(from.start(), to.start(), away.max(PAGE), &pagemap).done, away);
        }
        is_over.store(true, Relaxed);
        corrected
    });
    std::println!("{corrected} of 20000 calls moved more than they said");
    for page in 0..PAGES {
        assert!(from.bytes(page * PAGE, PAGE).iter().all(|&byte| usize::from(byte) == page + 1));
    }
}

#[test]
fn a_fence_lets_reads_through_and_a_write_waits_until_it_is_lifted() {
    let Some(uffd) = scratch() else {
        std::println!("skipped: no userfaultfd with MOVE here");
        return;
    };
    let mut page = Mapping::new(PAGE, c"spmem test").expect("mmap");
    let at = page.start();
    page.bytes_mut(0, PAGE).fill(3);
    uffd.register(at, PAGE).expect("register");
    assert_eq!(uffd.fence(at, PAGE), Err(Errno::ENOENT), "not registered for it");
    uffd.register_for(at, PAGE, Watch::MissingAndFenced).expect("register");
    uffd.fence(at, PAGE).expect("fence");
    assert!(page.bytes(0, PAGE).iter().all(|&byte| byte == 3));
    let is_written = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            page.bytes_mut(0, 1)[0] = 4;
            is_written.store(true, Relaxed);
        });
        let event = loop {
            if let Ok(event) = uffd.read() {
                break event;
            }
            std::thread::yield_now();
        };
        assert!(
            matches!(event, Event::Fault { address, is_fenced: true, is_write: true, .. } if address == at),
            "{event:?}"
        );
        assert!(!is_written.load(Relaxed));
        uffd.lift_fence(at, PAGE).expect("lift");
    });
    assert!(is_written.load(Relaxed));
}

#[test]
fn an_occupied_destination_stops_a_move_and_nothing_is_lost() {
    let Some(uffd) = scratch() else {
        std::println!("skipped: no userfaultfd with MOVE here");
        return;
    };
    let mut from = Mapping::new(2 * PAGE, c"spmem test").expect("mmap");
    let mut to = Mapping::new(2 * PAGE, c"spmem test").expect("mmap");
    from.bytes_mut(0, 2 * PAGE).fill(1);
    to.bytes_mut(PAGE, PAGE).fill(2);
    uffd.register(to.start(), to.len()).expect("register");
    let first = uffd.move_pages(to.start(), from.start(), 2 * PAGE);
    assert_eq!(first.done, PAGE);
    assert_eq!(uffd.move_pages(to.start() + PAGE, from.start() + PAGE, PAGE).stopped, Some(Errno::EEXIST));
    assert!(from.bytes(PAGE, PAGE).iter().all(|&b| b == 1));
    assert!(to.bytes(PAGE, PAGE).iter().all(|&b| b == 2));
}

#[test]
fn pages_of_two_mappings_are_not_one_registered_range() {
    let Some(uffd) = scratch() else {
        std::println!("skipped: no userfaultfd with MOVE here");
        return;
    };
    let mut memory = Mapping::new(4 * PAGE, c"spmem test").expect("mmap");
    let forbidden = Mapping::reserve(PAGE, PAGE, c"spmem test").expect("mmap");
    memory.bytes_mut(0, PAGE).fill(7);
    let start = memory.start();
    uffd.register(start, 3 * PAGE).expect("register");
    let is_registered = |page: usize, pages: usize| {
        uffd.is_registered(start + page * PAGE, pages * PAGE, forbidden.start()).expect("nothing changes")
    };
    assert!(is_registered(0, 1) && is_registered(2, 1) && !is_registered(3, 1));
    assert!(is_registered(0, 2) && is_registered(1, 2) && !is_registered(2, 2), "what is registered ends there");
    // SAFETY: of the test's own mapping; a flag more makes the page a mapping of its own.
    unsafe { syscall!(Sysno::madvise, start + PAGE, PAGE, libc::MADV_DONTFORK) }.expect("madvise");
    assert!(is_registered(1, 1) && !is_registered(0, 2) && !is_registered(1, 2));
    assert_eq!(memory.bytes(0, PAGE), [7; PAGE], "a question writes nothing");
    let pagemap = Pagemap::open().expect("pagemap");
    assert_eq!(
        (1..4).map(|page| pagemap.is_there(start + page * PAGE)).collect::<std::vec::Vec<_>>(),
        [Ok(false); 3]
    );
}
