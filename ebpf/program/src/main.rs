//! The gate's BPF program: reads a packet, asks `shroud-gate` what to do, does it, counts it.
//!
//! ```text
//!   pod device ──> pod ──> stack ──> egress ──> uplink          (egress: pass, redirect into the encryption device, or drop)
//!                                    ingress <── uplink          (ingress: pass or drop)
//!                                  decrypted <── encryption device  (decrypted: pass or drop)
//! ```
//!
//! No helper newer than Linux 5.8, no loop the verifier has to guess, so that the same object runs on 6.1 and later. It decides nothing
//! itself and remembers nothing but counters.

#![no_std]
#![no_main]

use core::num::NonZeroUsize;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_redirect, bpf_skb_load_bytes};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, LpmTrie, PerCpuArray, PerCpuHashMap, RingBuf};
use aya_ebpf::programs::TcContext;
use shroud_gate::{
    Action, Address, Bytes, Count, CounterKey, Direction, DropEvent, Entry, Family, Flow, LONGEST_READ, Link, Lookup,
    PREFIX_KEY_BITS, Packet, PrefixKey, Reason, Settings, Verdict,
};

/// Both generations of the table; a key begins with its generation.
#[map]
static PREFIXES: LpmTrie<PrefixKey, Entry> = LpmTrie::with_max_entries(262_144, 0);

/// The settings of both generations.
#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(2, 0);

/// Which generation is in force. Written last.
#[map]
static ACTIVE: Array<u32> = Array::with_max_entries(1, 0);

/// What was decided, by node, reason, direction and family.
#[map]
static COUNTERS: PerCpuHashMap<CounterKey, Count> = PerCpuHashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// What was dropped.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// How many events this CPU has sent in the current second.
#[map]
static EVENT_BUDGET: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1, 0);

const BPF_F_NO_PREALLOC: u32 = 1;

/// A flood of dropped packets must not become a flood of events: counters tell how many, events tell who.
const EVENTS_PER_SECOND: u64 = 100;

#[repr(C)]
struct Budget {
    second: u64,
    spent: u64,
}

#[classifier]
pub fn shroud_egress(ctx: TcContext) -> i32 {
    egress(&ctx, Link::Ethernet)
}

#[classifier]
pub fn shroud_ingress(ctx: TcContext) -> i32 {
    ingress(&ctx, Link::Ethernet)
}

#[classifier]
pub fn shroud_pod(ctx: TcContext) -> i32 {
    pod(&ctx, Link::Ethernet)
}

#[classifier]
pub fn shroud_l3_out(ctx: TcContext) -> i32 {
    egress(&ctx, Link::Ip)
}

#[classifier]
pub fn shroud_l3_in(ctx: TcContext) -> i32 {
    ingress(&ctx, Link::Ip)
}

#[classifier]
pub fn shroud_l3_pod(ctx: TcContext) -> i32 {
    pod(&ctx, Link::Ip)
}

#[classifier]
pub fn shroud_decrypt(ctx: TcContext) -> i32 {
    decrypted(&ctx, Link::Ethernet)
}

#[classifier]
pub fn shroud_l3_decr(ctx: TcContext) -> i32 {
    decrypted(&ctx, Link::Ip)
}

#[inline(always)]
fn egress(ctx: &TcContext, link: Link) -> i32 {
    // The kernel always finds the one entry of an array; the verifier wants to hear what if not.
    let Some(table) = Table::active() else {
        return TC_ACT_SHOT;
    };
    let mut packet = Packet::NOT_IP;
    read(ctx, link, table.settings, &mut packet);
    let verdict = shroud_gate::egress(&packet, mark(ctx), &table);
    if verdict.reason == Reason::Tunnel {
        forbid_fragments(ctx, link);
    }
    settle(ctx, Direction::Egress, &packet, &verdict)
}

#[inline(always)]
fn ingress(ctx: &TcContext, link: Link) -> i32 {
    let Some(table) = Table::active() else {
        return TC_ACT_SHOT;
    };
    let mut packet = Packet::NOT_IP;
    read(ctx, link, table.settings, &mut packet);
    let verdict = shroud_gate::ingress(&packet, &table);
    settle(ctx, Direction::Ingress, &packet, &verdict)
}

#[inline(always)]
fn decrypted(ctx: &TcContext, link: Link) -> i32 {
    let Some(table) = Table::active() else {
        return TC_ACT_SHOT;
    };
    let mut packet = Packet::NOT_IP;
    read(ctx, link, table.settings, &mut packet);
    let verdict = shroud_gate::decrypted(&packet, &table);
    settle(ctx, Direction::Decrypted, &packet, &verdict)
}

#[inline(always)]
fn pod(ctx: &TcContext, link: Link) -> i32 {
    let Some(table) = Table::active() else {
        return TC_ACT_UNSPEC;
    };
    let mut packet = Packet::NOT_IP;
    read(ctx, link, table.settings, &mut packet);
    let old = mark(ctx);
    let new = shroud_gate::pod_mark(&packet, old, &table);
    if new != old {
        ctx.skb.set_mark(new);
    }
    TC_ACT_UNSPEC
}

// What is not inlined below is so because of the stack: 512 bytes for all, and the optimizer fills them with loose bytes of addresses
// wherever it can see through a call. Nor is it mangled: a mangled name contains a hash of the checkout's path, and the object has to be
// the same everywhere.

#[inline(never)]
#[unsafe(no_mangle)]
fn read(ctx: &TcContext, link: Link, settings: &Settings, packet: &mut Packet) {
    packet.read(&mut Skb::new(ctx), link, settings);
    forget(ctx, packet);
}

/// Makes the verifier forget which constants were written into the packet, and changes none of them.
///
/// It walks what comes after once for every combination of them, which was four fifths of all its work, and seconds at each load of the
/// gate on a slow machine.
#[inline(always)]
fn forget(ctx: &TcContext, packet: &mut Packet) {
    // SAFETY: the context the kernel passed is a valid `__sk_buff`. A device's index does not change on the way, and volatile is what
    // keeps the compiler from knowing the difference of two readings; to the verifier they are any two numbers.
    let zero = unsafe {
        let index = &raw const (*ctx.skb.skb).ifindex;
        (index.read_volatile() ^ index.read_volatile()) as u8
    };
    packet.vni |= u32::from(zero);
    // SAFETY: enums of one initialised byte (`repr(u8)`), to which nothing is added; so for all below.
    unsafe { blur(&raw mut packet.shape, zero) };
    forget_flow(&mut packet.outer, zero);
    forget_flow(&mut packet.inner, zero);
}

#[inline(always)]
fn forget_flow(flow: &mut Flow, zero: u8) {
    flow.protocol |= zero;
    flow.icmpv6 |= zero;
    flow.source_port[0] |= zero;
    flow.source_port[1] |= zero;
    flow.destination_port[0] |= zero;
    flow.destination_port[1] |= zero;
    // SAFETY: as above.
    unsafe {
        blur(&raw mut flow.upper, zero);
    }
    forget_address(&mut flow.source, zero);
    forget_address(&mut flow.destination, zero);
}

#[inline(always)]
fn forget_address(address: &mut Address, zero: u8) {
    // SAFETY: as above.
    unsafe { blur(&raw mut address.family, zero) };
    // Of an IPv4 address twelve bytes are known to be zero.
    let number = u128::from_ne_bytes(address.bytes) | u128::from(zero) | u128::from(zero) << 64;
    address.bytes = number.to_ne_bytes();
}

/// # Safety
/// The value is one initialised byte, and `zero` is 0.
#[inline(always)]
unsafe fn blur<T>(value: *mut T, zero: u8) {
    const { assert!(size_of::<T>() == 1) };
    let byte = value.cast::<u8>();
    // SAFETY: the caller says so; the byte that is written is the one that was read.
    unsafe { byte.write(byte.read() | zero) };
}

/// Sets the "don't fragment" bit (RFC 791 §3.1) of an IPv4 packet that is whole, so that a router to whom it is too large says so instead
/// of cutting it up. Packets of a tunnel that the kernel makes come without. Those that cannot be changed go as they are.
#[inline(never)]
#[unsafe(no_mangle)]
fn forbid_fragments(ctx: &TcContext, link: Link) {
    const IPV4: [u8; 2] = [0x08, 0x00];
    const FORBID: u16 = 0x4000;
    const FORBID_MORE_AND_OFFSET: u16 = 0x7fff;
    const FIELD: usize = 6;
    const CHECKSUM: usize = 10;
    let mut bytes = Skb::new(ctx);
    let start = match link {
        Link::Ethernet if bytes.read::<2>(12) == Some(&IPV4) => 14,
        Link::Ip if matches!(bytes.read::<1>(0), Some([first]) if first >> 4 == 4) => 0,
        Link::Ethernet | Link::Ip => return,
    };
    let Some(&old) = bytes.read::<2>(start + FIELD) else { return };
    if u16::from_be_bytes(old) & FORBID_MORE_AND_OFFSET != 0 {
        return;
    }
    let new = (u16::from_be_bytes(old) | FORBID).to_be_bytes();
    let (from, to) = (u16::from_ne_bytes(old), u16::from_ne_bytes(new));
    if ctx.l3_csum_replace(start + CHECKSUM, u64::from(from), u64::from(to), 2).is_ok() {
        let _ = ctx.store(start + FIELD, &new, 0);
    }
}

/// Turns the verdict into a return code, and counts it. Passing is `TC_ACT_UNSPEC` ("go on"), so that programs behind ours still run.
///
/// Nothing is asked of the verdict once a function that is not inlined was called. Linux 6.1 takes two states for the same inside such a
/// function that differ in a constant of its caller, never walks a branch on that constant, and removes it as dead; 6.12 does not. It was
/// seen to remove the redirect.
#[inline(always)]
fn settle(ctx: &TcContext, direction: Direction, packet: &Packet, verdict: &Verdict) -> i32 {
    if verdict.reason == Reason::NotIp {
        return TC_ACT_UNSPEC;
    }
    let code = match verdict.action {
        Action::Pass => TC_ACT_UNSPEC,
        Action::Redirect(device) => redirect(device),
        Action::Drop => TC_ACT_SHOT,
    };
    if verdict.action == Action::Drop || verdict.audited {
        report(ctx, direction, packet, verdict);
    }
    count(ctx, direction, packet, verdict);
    code
}

#[inline(always)]
fn redirect(device: u32) -> i32 {
    // SAFETY: the helper takes two numbers. It answers TC_ACT_REDIRECT, or TC_ACT_SHOT for flags it does not know.
    (unsafe { bpf_redirect(device, 0) }) as i32
}

#[inline(never)]
#[unsafe(no_mangle)]
fn count(ctx: &TcContext, direction: Direction, packet: &Packet, verdict: &Verdict) {
    let key = CounterKey {
        node: verdict.node,
        reason: verdict.reason as u8,
        direction: direction as u8,
        family: family(packet),
        audited: verdict.audited as u8,
        reserved: [0; 4],
    };
    // SAFETY: the context the kernel passed is a valid `__sk_buff`.
    let (length, segments) = unsafe { (u64::from((*ctx.skb.skb).len), u64::from((*ctx.skb.skb).gso_segs)) };
    let packets = if segments == 0 { 1 } else { segments };
    if COUNTERS.get_ptr_mut(key).is_none() {
        // A full map costs us a count, never a packet.
        let _ = COUNTERS.insert(key, Count { packets: 0, bytes: 0 }, 0);
    }
    let Some(count) = COUNTERS.get_ptr_mut(key) else { return };
    // SAFETY: the map gave us this CPU's value, which nobody else writes while we run.
    unsafe {
        (*count).packets += packets;
        (*count).bytes += length;
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
fn report(ctx: &TcContext, direction: Direction, packet: &Packet, verdict: &Verdict) {
    if !afford_an_event() {
        return;
    }
    let mut event = DropEvent {
        source: [0; 16],
        destination: [0; 16],
        node: verdict.node,
        // SAFETY: the context the kernel passed is a valid `__sk_buff`.
        device: unsafe { (*ctx.skb.skb).ifindex },
        source_port: [0; 2],
        destination_port: [0; 2],
        family: family(packet),
        protocol: 0,
        reason: verdict.reason as u8,
        direction: direction as u8,
        audited: verdict.audited as u8,
        reserved: [0; 3],
    };
    if let Some(flow) = packet.flow() {
        event.source = flow.source.bytes;
        event.destination = flow.destination.bytes;
        event.protocol = flow.protocol;
        event.source_port = flow.source_port;
        event.destination_port = flow.destination_port;
    }
    // A full buffer costs us an event, never a packet.
    let _ = EVENTS.output::<DropEvent>(&event, 0);
}

#[inline(always)]
fn afford_an_event() -> bool {
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the helper takes nothing and gives a number; the map gave us this CPU's value, which nobody else writes while we run.
    unsafe {
        let second = bpf_ktime_get_ns() / 1_000_000_000;
        if (*budget).second != second {
            (*budget).second = second;
            (*budget).spent = 0;
        }
        (*budget).spent += 1;
        (*budget).spent <= EVENTS_PER_SECOND
    }
}

#[inline(always)]
fn family(packet: &Packet) -> u8 {
    match packet.flow() {
        Some(flow) => flow.source.family.number(),
        None => 0,
    }
}

#[inline(always)]
fn mark(ctx: &TcContext) -> u32 {
    // SAFETY: the context the kernel passed is a valid `__sk_buff`.
    unsafe { (*ctx.skb.skb).mark }
}

/// The generation in force when the packet came; the packet sees no other.
struct Table {
    generation: u8,
    settings: &'static Settings,
}

impl Table {
    #[inline(always)]
    fn active() -> Option<Self> {
        let active = *ACTIVE.get(0)? & 1;
        let settings = SETTINGS.get(active)?;
        Some(Self {
            generation: active as u8,
            settings,
        })
    }
}

impl Lookup for Table {
    #[inline(always)]
    fn settings(&self) -> &Settings {
        self.settings
    }

    #[inline(always)]
    fn entry(&self, address: &Address) -> Entry {
        let mut entry = Entry::default();
        find(self.generation, address, &mut entry);
        entry
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
fn find(generation: u8, address: &Address, entry: &mut Entry) {
    let length = match address.family {
        Family::V4 => PREFIX_KEY_BITS + 32,
        Family::V6 => PREFIX_KEY_BITS + 128,
    };
    if let Some(found) = PREFIXES.get(Key::new(length, PrefixKey::new(generation, address))) {
        *entry = *found;
    }
}

/// A packet's bytes, through a helper that also reads what lies in page fragments.
struct Skb<'a> {
    ctx: &'a TcContext,
    buffer: [u8; LONGEST_READ],
}

impl<'a> Skb<'a> {
    #[inline(always)]
    fn new(ctx: &'a TcContext) -> Self {
        Self {
            ctx,
            buffer: [0; LONGEST_READ],
        }
    }
}

impl Bytes for Skb<'_> {
    #[inline(always)]
    fn read<const N: usize>(&mut self, offset: usize) -> Option<&[u8; N]> {
        let bytes = self.buffer.first_chunk_mut::<N>()?;
        // SAFETY: the helper writes N bytes to an array of N, or says that the packet is too short.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.ctx.skb.skb.cast(),
                offset as u32,
                bytes.as_mut_ptr().cast(),
                N as u32,
            )
        };
        (result == 0).then_some(bytes)
    }

    #[inline(always)]
    fn read_ip(&mut self, family: Family, offset: usize, flow: &mut Flow) -> Option<NonZeroUsize> {
        read_ip(self, family, offset, flow)
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
fn read_ip(skb: &mut Skb<'_>, family: Family, offset: usize, flow: &mut Flow) -> Option<NonZeroUsize> {
    shroud_gate::ip(skb, family, offset, flow)
}

/// Apache-2.0 like the rest; no helper we call asks for the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
