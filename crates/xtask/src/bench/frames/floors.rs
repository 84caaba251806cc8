//! What the figures of the frames bench are held against: what the same data costs without an allocator around it, and what two
//! threads cost that share nothing. So a bar that is missed tells how much of it is the machine's.
#![allow(clippy::cast_possible_truncation, reason = "8 GiB are 2^21 frames")]

use super::FRAMES;
use super::sides::Side;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize};

/// A frame is in use, or on a stack.
const USED: u8 = 1;
const HELD: u8 = 2;

/// What a cache cannot do without: a byte of the frame that is compared and stored, a stack, and the bit of the frame in its
/// zone. Nothing is searched, nobody else is looked for. With a lock: what the slot of a processor adds, an exchange to take it
/// and one to settle a free.
pub(super) struct Bare<const LOCKED: bool> {
    states: Vec<AtomicU8>,
    rows: Vec<AtomicU64>,
    next: AtomicUsize,
}

/// A thread's stack: its part of the frames, all free.
pub(super) struct Stack {
    is_taken: AtomicBool,
    free: Vec<u32>,
}

impl<const LOCKED: bool> Bare<LOCKED> {
    pub(super) fn new() -> Self {
        Self {
            states: (0..FRAMES).map(|_| AtomicU8::new(HELD)).collect(),
            rows: (0..FRAMES / 64).map(|_| AtomicU64::new(0)).collect(),
            next: AtomicUsize::new(0),
        }
    }

    fn take_lock(stack: &Stack) {
        let is_mine = !LOCKED || stack.is_taken.compare_exchange(false, true, Acquire, Relaxed).is_ok();
        assert!(is_mine, "nobody else has it");
    }

    fn let_go(stack: &Stack) {
        if LOCKED {
            stack.is_taken.store(false, Release);
        }
    }

    fn flip(&self, frame: usize) {
        let row = &self.rows[frame / 64];
        row.store(row.load(Relaxed) ^ 1 << (frame % 64), Relaxed);
    }
}

impl<const LOCKED: bool> Side for Bare<LOCKED> {
    type Handle = Stack;
    const HAS_ORDERS: bool = false;

    fn handle(&self) -> Stack {
        let half = FRAMES as u32 / 2;
        let first = self.next.fetch_add(1, Relaxed) as u32 % 2 * half;
        Stack { is_taken: AtomicBool::new(false), free: (first..first + half).rev().collect() }
    }

    fn alloc(&self, stack: &mut Stack, _: u8) -> Option<usize> {
        Self::take_lock(stack);
        let frame = stack.free.pop()? as usize;
        let state = &self.states[frame];
        assert_eq!(state.load(Relaxed), HELD);
        state.store(USED, Relaxed);
        self.flip(frame);
        Self::let_go(stack);
        Some(frame)
    }

    fn free(&self, stack: &mut Stack, frame: usize, _: u8) {
        Self::take_lock(stack);
        let state = &self.states[frame];
        if LOCKED {
            assert_eq!(state.compare_exchange(USED, HELD, Relaxed, Relaxed), Ok(USED));
        } else {
            assert_eq!(state.load(Relaxed), USED);
            state.store(HELD, Relaxed);
        }
        self.flip(frame);
        stack.free.push(frame as u32);
        Self::let_go(stack);
    }
}

/// A side for each of two threads: they share nothing.
pub(super) struct Apart<S> {
    sides: [S; 2],
    next: AtomicUsize,
}

impl<S: Side> Apart<S> {
    pub(super) fn new(make: impl Fn() -> anyhow::Result<S>) -> anyhow::Result<Self> {
        Ok(Self { sides: [make()?, make()?], next: AtomicUsize::new(0) })
    }
}

impl<S: Side> Side for Apart<S> {
    type Handle = (usize, S::Handle);
    const HAS_ORDERS: bool = S::HAS_ORDERS;
    const HAS_BATCH: bool = S::HAS_BATCH;
    const IS_CHURNED: bool = false;

    fn handle(&self) -> Self::Handle {
        let side = self.next.fetch_add(1, Relaxed) % 2;
        (side, self.sides[side].handle())
    }

    fn alloc(&self, (side, handle): &mut Self::Handle, order: u8) -> Option<usize> {
        self.sides[*side].alloc(handle, order)
    }

    fn free(&self, (side, handle): &mut Self::Handle, frame: usize, order: u8) {
        self.sides[*side].free(handle, frame, order);
    }

    fn finish(&self, (side, handle): &mut Self::Handle) {
        self.sides[*side].finish(handle);
    }

    fn alloc_batch(&self, (side, handle): &mut Self::Handle) {
        self.sides[*side].alloc_batch(handle);
    }

    fn free_batch(&self, (side, handle): &mut Self::Handle) {
        self.sides[*side].free_batch(handle);
    }
}
