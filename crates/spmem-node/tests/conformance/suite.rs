//! What every byte-addressable kind of node must pass, whatever it is made of. Every byte is checked.
//!
//! [`claims`] lists it; each claim makes nodes of its [`Kind`] and panics where it does not hold. Run by this crate's tests for
//! what every machine has, and in the guests of `cargo xtask vm-test` for the rest.

use spmem_core::frames::Metadata;
use spmem_core::node::{Class, Services};
use spmem_core::units::{DomainId, FrameCount, FrameNumber, NodeId, Order, PAGE_SIZE};
use spmem_core::wall::Request;
use spmem_core::zero::Initial;
use spmem_node::mapped::{MappedNode, Medium, OpenError, Peer, PeerId, Refused, Repair, mapped_spec};
use spmem_node::{Backend, Handle, PAGE_BYTES, Page};
use spmem_sys::region::{Access, Region};

use super::backend::{self, page_with_noise};

type Node<M> = MappedNode<M>;

/// A medium that lies in a region, which others map.
pub trait Mapped: Medium {
    /// What they map.
    fn region(&self) -> &Region;
}

impl Mapped for Region {
    fn region(&self) -> &Region {
        self
    }
}

/// One kind of node, as this machine has it.
pub struct Kind<M = Region> {
    /// For reports.
    pub name: String,
    /// Memory of its own for each call: at least 256 frames.
    pub region: Box<dyn Fn() -> M>,
    /// The same memory again, mapped anew; none for what does not outlive its process.
    pub again: Option<Box<dyn Fn() -> M>>,
    /// What mappings are multiples of.
    pub unit: usize,
}

/// A claim and its name.
pub type Claim<M> = (&'static str, fn(&Kind<M>));

/// All claims that apply to a kind.
pub fn claims<M: Mapped>(kind: &Kind<M>) -> Vec<Claim<M>> {
    let mut all: Vec<Claim<M>> = vec![
        ("what is stored comes back", |kind| backend::what_is_stored_comes_back(|_| kind.node(FENCED))),
        ("same_as tells a page from any other", |kind| {
            backend::same_as_tells_the_page_from_any_other(|_| kind.node(FENCED));
        }),
        ("a forgotten page is gone and its room is back", |kind| {
            backend::a_forgotten_page_is_gone_and_its_room_is_back(|_| kind.node(FENCED));
        }),
        ("a full node refuses and loses nothing (R10)", a_full_node_refuses_and_loses_nothing),
        ("without a grant nothing is had (R12)", without_a_grant_nothing_is_had),
        ("a revoked grant gives nothing and its pages leave (R13)", a_revoked_grant_gives_nothing),
        ("what stays after revocation is listed (R13)", what_stays_after_revocation_is_listed),
        ("a fenced page is read in place and leaves to be written (R17)", a_fenced_page_is_read_in_place),
        ("an unfenced block is written in place", an_unfenced_block_is_written_in_place),
        ("another domain gets zeros (R21)", another_domain_gets_zeros),
        ("poison hurts the holder only (R20)", poison_hurts_the_holder_only),
        ("wrong bytes are not handed out (R20)", wrong_bytes_are_not_handed_out),
        ("a block given back twice is reported", a_block_given_back_twice_is_reported),
    ];
    if kind.again.is_some() {
        all.extend([
            ("what was there is there after reopening", what_was_there_is_there as fn(&Kind<M>)),
            ("a block has one owner at any time", a_block_has_one_owner),
        ]);
    }
    all
}

const FENCED: Services = Services::MIGRATION.union(Services::WRITE_FENCE);
const OPEN: Services = Services::MIGRATION;
const THIS: NodeId = NodeId::ONE;

impl<M: Mapped> Kind<M> {
    /// A node of its own, empty. Persistent media are formatted and opened, others used as they are.
    fn node(&self, services: Services) -> Node<M> {
        let mut region = (self.region)();
        if self.again.is_some() {
            MappedNode::format(&mut region, [9; 16], PAGE_SIZE, spmem_node::mapped::Overwrite::Yes).unwrap();
            return open(region, services).unwrap();
        }
        let lent = Metadata::from_heap(FrameCount(Medium::len(&region) / PAGE_SIZE)).unwrap();
        let spec = mapped_spec(Class::Slower, services, "suite");
        MappedNode::new(region, THIS, spec, lent, Initial::Unknown).unwrap()
    }
}

fn open<M: Mapped>(region: M, services: Services) -> Result<Node<M>, OpenError> {
    let spec = mapped_spec(Class::Shared, services, "suite");
    MappedNode::open(region, THIS, spec, Repair::Refuse, Metadata::from_heap).map(|(node, _)| node)
}

fn page(seed: u64) -> Page {
    page_with_noise(seed + 1, 256)
}

fn assert_holds<M: Mapped>(node: &Node<M>, handle: Handle, page: &Page) {
    let mut back = [0x5a; PAGE_BYTES];
    node.load(handle, &mut back).unwrap();
    assert!(back == *page, "every byte of the page");
}

/// Reads as a program does that has the page mapped: through another mapping, which may only be read.
fn read_in_place<M: Mapped>(kind: &Kind<M>, node: &Node<M>, handle: Handle) -> Page {
    let offset = usize::try_from(node.place_on_medium(handle).unwrap()).unwrap();
    let first = offset / kind.unit * kind.unit;
    let view = node.medium().region().view(first, kind.unit, Access::Read).unwrap();
    assert_eq!(kernel_says(view.start()), "r--s", "the fence is the kernel's");
    let mut page = [0; PAGE_BYTES];
    view.read(offset - first, &mut page).unwrap();
    page
}

/// The rights of the mapping that holds an address.
fn kernel_says(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let number = |text: &str| usize::from_str_radix(text, 16).unwrap();
    let line = maps.lines().find(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        (number(start)..number(rest.split_once(' ').unwrap().0)).contains(&address)
    });
    line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or("none").to_owned()
}

fn a_full_node_refuses_and_loses_nothing<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(FENCED);
    let capacity = node.usage().capacity.0 / PAGE_SIZE;
    // The rest is taken under another grant: so the claim ends where memory is large, and it is not the quota that ends.
    let pages = (capacity - 1).min(300);
    let grants = node.frames().grant().id();
    let mut ballast = Vec::new();
    let (mm, owner) = node.frames_mut().parts_mut();
    let terms = spmem_core::grant::Terms::new(spmem_core::grant::Rights::ALLOC, FrameCount(capacity).bytes());
    let grant = mm.registry_mut().grant(&[owner], terms).unwrap();
    for _ in 0..capacity - pages {
        ballast.push(mm.alloc(&Request::on(DomainId::ROOT, THIS, &[&grant]), Order::ZERO).unwrap());
    }
    let stored: Vec<Handle> = (0..pages).map(|seed| node.demote(DomainId::ROOT, &page(seed)).unwrap()).collect();
    assert_eq!(node.frames().mm().registry().held(grants).unwrap()[0].bytes, FrameCount(pages).bytes());
    let Err(Refused::Alloc(refused)) = node.demote(DomainId::ROOT, &page(0)) else { panic!("it is full") };
    assert!(matches!(refused, spmem_core::mm::AllocError::Exhausted { node: THIS, .. }), "{refused}");
    assert_eq!(node.frames().mm().stats(NodeId::ZERO).unwrap().used, FrameCount(0), "nothing spilt");
    for (seed, &handle) in (0..).zip(&stored) {
        assert_holds(&node, handle, &page(seed));
    }
    node.release(stored[7]).unwrap();
    let again = node.demote(DomainId::ROOT, &page(7)).unwrap();
    assert_holds(&node, again, &page(7));
}

fn without_a_grant_nothing_is_had<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(FENCED);
    let handle = node.demote(DomainId::ROOT, &page(1)).unwrap();
    let used = node.frames().mm().stats(THIS).unwrap().used;
    let request = Request::on(DomainId::ROOT, THIS, &[]);
    assert!(node.frames_mut().mm_mut().alloc(&request, Order::ZERO).is_err());
    assert!(node.frames_mut().mm_mut().alloc_at(&request, THIS, FrameNumber(99), Order::ZERO).is_err());
    assert!(matches!(node.place_to_read(handle, &[]), Err(Refused::Rights(_))));
    assert_eq!(node.frames().mm().stats(THIS).unwrap().used, used);
    let address = node.place_to_read(handle, &[node.frames().grant()]).unwrap().unwrap();
    let offset = usize::try_from(node.place_on_medium(handle).unwrap()).unwrap();
    assert_eq!(address, node.medium().region().start() + offset);
}

fn a_revoked_grant_gives_nothing<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(FENCED);
    let stored: Vec<Handle> = (0..20).map(|seed| node.demote(DomainId::ROOT, &page(seed)).unwrap()).collect();
    let mut moved = Vec::new();
    let held = node.revoke(|handle, page| {
        moved.push((handle, *page));
        true
    });
    assert_eq!(held.unwrap(), []);
    assert_eq!(moved.len(), stored.len());
    for (handle, bytes) in &moved {
        let seed = stored.iter().position(|one| one == handle).unwrap();
        assert!(*bytes == page(seed as u64), "every byte has moved");
        assert!(node.load(*handle, &mut [0; PAGE_BYTES]).is_err());
    }
    assert!(matches!(node.demote(DomainId::ROOT, &page(0)), Err(Refused::Alloc(_))));
    assert!(matches!(node.place_to_read(stored[0], &[node.frames().grant()]), Err(Refused::Rights(_))));
    assert_eq!(node.usage().used.0, 0);
}

fn what_stays_after_revocation_is_listed<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(OPEN);
    let sealed = node.demote(DomainId::ROOT, &page(3)).unwrap();
    let written = node.alloc(DomainId::ROOT, Order::new(2).unwrap()).unwrap();
    node.write(written, PAGE_SIZE, &[6; 64]).unwrap();
    let grant = node.frames().grant().id();
    let held = node.revoke(|_, _| false).unwrap();
    assert_eq!((held.len(), held[0].grant, held[0].bytes), (1, grant, FrameCount(5).bytes()));
    assert_holds(&node, sealed, &page(3));
    let mut back = [0; 64];
    node.read(written, PAGE_SIZE, &mut back).unwrap();
    assert_eq!(back, [6; 64], "what stays is valid");
    node.release(written).unwrap();
    node.release(sealed).unwrap();
    assert_eq!(node.frames().mm().registry().held(grant).unwrap(), []);
}

fn a_fenced_page_is_read_in_place<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(FENCED);
    let handle = node.demote(DomainId::ROOT, &page(5)).unwrap();
    assert!(read_in_place(kind, &node, handle) == page(5), "every byte, in place");
    let fenced = Refused::Fenced { node: THIS };
    assert_eq!(node.write(handle, 0, &[1; 8]), Err(fenced.clone()));
    assert_eq!(node.alloc(DomainId::ROOT, Order::ZERO), Err(fenced.clone()));
    assert_eq!(node.hand_over(handle, PeerId(1)), Err(fenced));
    let shown = Vec::new();
    assert!(matches!(node.place_to_write(handle, &shown), Err(Refused::Fenced { .. })));
    assert_holds(&node, handle, &page(5));
    let mut moved = [0; PAGE_BYTES];
    node.promote(handle, &mut moved).unwrap();
    assert!(moved == page(5), "every byte, moved");
    assert!(node.load(handle, &mut moved).is_err());
    assert_eq!(moved, [0; PAGE_BYTES]);
}

fn an_unfenced_block_is_written_in_place<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(OPEN);
    for order in [0, 3, 7].map(|order| Order::new(order).unwrap()) {
        let handle = node.alloc(DomainId::ROOT, order).unwrap();
        for index in 0..order.frames().0 {
            node.write(handle, index * PAGE_SIZE, &page(index)).unwrap();
        }
        node.flush(handle).unwrap();
        for index in 0..order.frames().0 {
            let mut back = [0; PAGE_BYTES];
            node.read(handle, index * PAGE_SIZE, &mut back).unwrap();
            assert!(back == page(index), "every byte of page {index}");
        }
        let end = order.bytes().0;
        let mut back = [0; 16];
        assert!(matches!(node.read(handle, end - 8, &mut back), Err(Refused::OutOfBlock { .. })));
        assert!(matches!(node.write(handle, 4, &back), Err(Refused::OutOfBlock { .. })));
        assert!(read_in_place(kind, &node, handle) == page(0), "every byte, in place");
        node.release(handle).unwrap();
    }
    // A demoted page can be written, too, where nothing fences it.
    let handle = node.demote(DomainId::ROOT, &page(1)).unwrap();
    node.write(handle, 0, &[0xee; 8]).unwrap();
    let mut expected = page(1);
    expected[..8].fill(0xee);
    assert_holds(&node, handle, &expected);
}

fn another_domain_gets_zeros<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(OPEN);
    let registry = node.frames_mut().mm_mut().registry_mut();
    let other = registry.create_domain(DomainId::ROOT, "other").unwrap();
    let order = Order::new(1).unwrap();
    let first = node.alloc(DomainId::ROOT, order).unwrap();
    let place = node.place_on_medium(first).unwrap();
    for index in 0..2 {
        node.write(first, index * PAGE_SIZE, &page(index)).unwrap();
    }
    node.release(first).unwrap();
    let mut reused = false;
    for _ in 0..8 {
        let handle = node.alloc(other, order).unwrap();
        reused |= node.place_on_medium(handle).unwrap() == place;
        for index in 0..2 {
            let mut back = [1; PAGE_BYTES];
            node.read(handle, index * PAGE_SIZE, &mut back).unwrap();
            assert!(back == [0; PAGE_BYTES], "every byte is zero");
        }
    }
    assert!(reused, "the frames that were written are given out again");
}

fn poison_hurts_the_holder_only<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(OPEN);
    let order = Order::new(2).unwrap();
    let hurt = node.alloc(DomainId::ROOT, order).unwrap();
    let well = node.demote(DomainId::ROOT, &page(4)).unwrap();
    let first = frame_of(hurt);
    let broken = FrameNumber(first.0 + 2);
    assert_eq!(node.poison(broken), Ok(Some(hurt)), "its holder is told");
    assert!(matches!(node.read(hurt, 0, &mut [0; 8]), Err(Refused::Corrupt(_))));
    assert_holds(&node, well, &page(4));
    node.release(hurt).unwrap();
    assert_eq!(node.poison(broken), Ok(None), "nobody has it any more");
    let free = FrameNumber(first.0 + 1);
    assert_eq!(node.poison(free), Ok(None));
    assert_eq!(node.frames().mm().stats(THIS).unwrap().poisoned, FrameCount(2));
    let mut taken = Vec::new();
    for _ in 0..100 {
        taken.push(node.alloc(DomainId::ROOT, Order::ZERO).unwrap());
    }
    assert!(taken.iter().all(|&one| frame_of(one) != broken && frame_of(one) != free), "never given again");
    assert!(taken.iter().any(|&one| frame_of(one) == first), "its neighbours are");
    assert!(matches!(node.poison(FrameNumber(u32::MAX)), Err(Refused::OutOfBlock { .. })));
}

fn frame_of(handle: Handle) -> FrameNumber {
    FrameNumber(u32::try_from(handle.raw() & 0xffff_ffff).unwrap())
}

fn wrong_bytes_are_not_handed_out<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(FENCED);
    let handle = node.demote(DomainId::ROOT, &page(2)).unwrap();
    let other = node.demote(DomainId::ROOT, &page(3)).unwrap();
    let offset = usize::try_from(node.place_on_medium(handle).unwrap()).unwrap();
    let first = offset / kind.unit * kind.unit;
    let view = node.medium().region().view(first, kind.unit, Access::ReadWrite).unwrap();
    let mut word = [0; 8];
    view.read(offset - first + 808, &mut word).unwrap();
    word[3] ^= 0x10;
    view.write(offset - first + 808, &word).unwrap();
    let mut back = [7; PAGE_BYTES];
    let corrupt = node.load(handle, &mut back).unwrap_err();
    assert_eq!((corrupt.node, corrupt.frame), (THIS, Some(frame_of(handle))));
    assert_eq!(back, [0; PAGE_BYTES]);
    assert_holds(&node, other, &page(3));
    assert_eq!(node.poison(frame_of(handle)), Ok(Some(handle)));
    node.release(handle).unwrap();
    assert_eq!(node.frames().mm().stats(THIS).unwrap().poisoned, FrameCount(1));
}

fn a_block_given_back_twice_is_reported<M: Mapped>(kind: &Kind<M>) {
    let mut node = kind.node(FENCED);
    let handle = node.demote(DomainId::ROOT, &page(1)).unwrap();
    node.release(handle).unwrap();
    assert!(matches!(node.release(handle), Err(Refused::Corrupt(_))));
    let next = node.demote(DomainId::ROOT, &page(2)).unwrap();
    assert_eq!(frame_of(next), frame_of(handle), "the same frame");
    assert!(matches!(node.release(handle), Err(Refused::Corrupt(_))), "another block is there now");
    assert_holds(&node, next, &page(2));
    let unknown = Handle::from_raw(1 << 32 | 0xffff_ffff).unwrap();
    assert!(matches!(node.release(unknown), Err(Refused::Corrupt(_))));
}

fn what_was_there_is_there<M: Mapped>(kind: &Kind<M>) {
    let again = kind.again.as_ref().expect("the claim is for persistent kinds");
    let mut node = kind.node(OPEN);
    let order = Order::new(3).unwrap();
    let mut pages: Vec<(Handle, Page)> = Vec::new();
    for seed in 0..40 {
        pages.push((node.demote(DomainId::ROOT, &page(seed)).unwrap(), page(seed)));
    }
    for at in [31, 20, 3] {
        node.release(pages.remove(at).0).unwrap();
    }
    let block = node.alloc(DomainId::ROOT, order).unwrap();
    node.write(block, 7 * PAGE_SIZE, &page(99)).unwrap();
    node.flush(block).unwrap();
    let (hurt, _) = pages.remove(5);
    node.poison(frame_of(hurt)).unwrap();
    node.release(hurt).unwrap();
    for is_closed in [true, false, false, true] {
        let known: Vec<(Handle, Order)> = node.handles().collect();
        let used = node.usage().used;
        if is_closed {
            node.close().unwrap();
        } else {
            drop(node);
        }
        node = open(again(), OPEN).unwrap();
        assert_eq!(node.handles().collect::<Vec<_>>(), known);
        assert_eq!(node.usage().used, used);
        assert_eq!(node.frames().mm().stats(THIS).unwrap().poisoned, FrameCount(1));
        assert_eq!(node.frames().mm().stats(THIS).unwrap().used.bytes(), used);
        for (handle, bytes) in &pages {
            assert_holds(&node, *handle, bytes);
        }
        let mut back = [0; PAGE_BYTES];
        node.read(block, 7 * PAGE_SIZE, &mut back).unwrap();
        assert!(back == page(99), "every byte");
        // What is new does not land on what is there.
        let new = node.demote(DomainId::ROOT, &page(500)).unwrap();
        assert!(known.iter().all(|(one, _)| frame_of(*one) != frame_of(new)) && frame_of(new) != frame_of(hurt));
        pages.push((new, page(500)));
    }
}

fn a_block_has_one_owner<M: Mapped>(kind: &Kind<M>) {
    let again = kind.again.as_ref().expect("the claim is for persistent kinds");
    let mut node = kind.node(OPEN);
    let sealed = node.demote(DomainId::ROOT, &page(1)).unwrap();
    let block = node.alloc(DomainId::ROOT, Order::new(1).unwrap()).unwrap();
    node.write(block, 0, &page(2)).unwrap();
    let (one, two, frame) = (PeerId(1), PeerId(2), frame_of(block));
    let mut peers = [one, two].map(|id| Peer::open(again(), id).unwrap());
    let mut back = [0; PAGE_BYTES];
    assert!(peers[1].load(frame_of(sealed), &mut back).unwrap() && back == page(1), "peers read what is sealed");
    assert!(!peers[1].load(frame, &mut back).unwrap() && back == [0; PAGE_BYTES], "and not what is written");
    assert_eq!(peers[0].write(frame, 0, &[1; 8]), Err(Refused::HandedOver { to: PeerId::COMPONENT }));

    node.hand_over(block, one).unwrap();
    let to_one = Err(Refused::HandedOver { to: one });
    assert_eq!(node.write(block, 0, &[1; 8]), to_one);
    assert_eq!(node.release(block), to_one);
    assert_eq!(node.accept(block), to_one);
    assert_eq!(peers[0].write(frame, 0, &[1; 8]), to_one, "not before it has taken it");
    assert_eq!(peers[1].accept(frame), to_one);
    peers[0].accept(frame).unwrap();
    peers[0].read(frame, 0, &mut back).unwrap();
    assert!(back == page(2), "every byte came along");
    peers[0].write(frame, PAGE_SIZE, &page(3)).unwrap();
    peers[0].hand_over(frame, two).unwrap();
    assert_eq!(peers[0].write(frame, 0, &[1; 8]), Err(Refused::HandedOver { to: two }));

    // The component ends; who owns what is on the medium.
    drop(node);
    node = open(again(), OPEN).unwrap();
    assert_eq!(node.write(block, 0, &[1; 8]), Err(Refused::HandedOver { to: two }));
    peers[1].accept(frame).unwrap();
    peers[1].read(frame, PAGE_SIZE, &mut back).unwrap();
    assert!(back == page(3), "every byte came along");
    let owners: Vec<PeerId> = peers[0].blocks().unwrap().iter().map(|block| block.owner).collect();
    assert!(owners.contains(&two) && owners.contains(&PeerId::COMPONENT) && owners.len() == 2);
    // Its memory breaks meanwhile. The record is the owner's, so nobody else writes it.
    assert_eq!(node.poison(frame), Ok(Some(block)));
    peers[1].write(frame, PAGE_SIZE, &page(3)).unwrap();
    peers[1].hand_over(frame, PeerId::COMPONENT).unwrap();
    assert!(node.write(block, 0, &[1; 8]).is_err());
    node.accept(block).unwrap();
    assert!(matches!(node.read(block, 0, &mut back), Err(Refused::Corrupt(_))), "it has not been forgotten");
    drop(node);
    node = open(again(), OPEN).unwrap();
    assert!(matches!(node.read(block, 0, &mut back), Err(Refused::Corrupt(_))), "nor by a restart");
    node.release(block).unwrap();

    let block = node.alloc(DomainId::ROOT, Order::new(1).unwrap()).unwrap();
    let frame = frame_of(block);
    node.hand_over(block, one).unwrap();
    peers[0].accept(frame).unwrap();
    peers[0].write(frame, PAGE_SIZE, &page(3)).unwrap();
    peers[0].hand_over(frame, PeerId::COMPONENT).unwrap();
    node.accept(block).unwrap();
    node.read(block, PAGE_SIZE, &mut back).unwrap();
    assert!(back == page(3), "every byte came back");
    node.write(block, 0, &[1; 8]).unwrap();
    node.release(block).unwrap();
}
