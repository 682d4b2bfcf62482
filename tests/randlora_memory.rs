//! The memory contract of the RandLoRA op: no ΔW, no dense gradient, no C ever exists, whichever
//! way is taken. Shown by counting allocations from outside.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use randlora::adapters::{BasesSpec, Distribution};
use randlora::{
    DType, Device, DropoutKey, Pairing, RandLoraOptions, Structure, Tensor, Way, randlora_linear,
};

/// Counts live bytes, their peak, and the largest single piece.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

fn grew(size: usize) {
    PEAK.fetch_max(LIVE.fetch_add(size, Relaxed) + size, Relaxed);
    LARGEST.fetch_max(size, Relaxed);
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grew(layout.size());
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grew(layout.size());
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const MIB: usize = 1 << 20;

/// Starts the counters over and gives what is live.
fn start() -> usize {
    let live = LIVE.load(Relaxed);
    PEAK.store(live, Relaxed);
    LARGEST.store(0, Relaxed);
    live
}

/// Each form that bases are stored in.
const KINDS: [(Distribution, Structure); 3] = [
    (Distribution::Uniform, Structure::Dense),
    (Distribution::Uniform, Structure::Block),
    (Distribution::Ternary { sparsity: 30.0 }, Structure::Dense),
];

/// One forward and backward with bases of all kinds; checks what it allocated.
fn check(tokens: usize, inputs: usize, outputs: usize, rank: usize, ways: (Way, Way), dropout: f64) {
    for kind in KINDS {
        check_with(kind, tokens, (inputs, outputs), rank, ways, dropout);
    }
}

fn check_with(
    (distribution, structure): (Distribution, Structure),
    tokens: usize,
    (inputs, outputs): (usize, usize),
    rank: usize,
    ways: (Way, Way),
    dropout: f64,
) {
    let key = DropoutKey { seed: 1, step: 2, site: 3 };
    let what = format!("T {tokens}, {inputs}→{outputs}, {distribution:?}, {structure:?}, {ways:?}");
    let device = Device::cpu();
    let (small, large) = (inputs.min(outputs), inputs.max(outputs));
    let n = small.div_ceil(rank);
    let spec = BasesSpec { seed: 0, distribution, structure, rank, small, large, pairing: Pairing::Paper };
    let options = RandLoraOptions {
        bases: Arc::new(spec.generate(&device).unwrap()),
        scale: 1.0,
        dropout: Some((dropout, key)),
        ways: Some(ways),
    };
    let full = |value, dims: [usize; 2]| Tensor::full(value, dims, DType::F32, &device).unwrap();
    let x = full(0.5, [tokens, inputs]).track();
    let weight = full(0.1, [outputs, inputs]);
    let (lambda, gamma) = (full(0.2, [rank, n]).track(), full(0.3, [n, small]).track());
    let dy = full(1.0, [tokens, outputs]);
    // Everything that a first product sets up once (threads, the GEMM's own state) is set up.
    full(1.0, [4, 4]).matmul(&full(1.0, [4, 4])).unwrap();
    device.trim();

    let before = start();
    device.reset_peaks();
    let inputs_live = device.memory().live_bytes;
    let y = randlora_linear(&x, &weight, None, &lambda, &gamma, &options).unwrap();
    let kept = device.memory().live_bytes - inputs_live;
    let gradients = y.backward_from(&dy).unwrap();
    let (peak, largest) = (PEAK.load(Relaxed) - before, LARGEST.load(Relaxed));
    assert_eq!(gradients.len(), 3, "{what}");

    let f32s = |n: usize| 4 * n;
    let (y_bytes, dx_bytes) = (f32s(tokens * outputs), f32s(tokens * inputs));
    let diagonals = f32s(3 * (rank * n + n * small));
    let h =
        if inputs > outputs && ways == (Way::Factored, Way::Factored) { f32s(tokens * n * rank) } else { 0 };
    // From forward to backward: the result, h where it is kept instead of x, and nothing beside.
    assert!(kept == y_bytes + h, "{what}: {kept} bytes kept");
    // Our scratch is at most 16 MiB and the GEMM's packing at most as much again.
    let scratch = device.memory().scratch_peak_bytes;
    assert!(scratch <= 16 * MIB, "{what}: {scratch} bytes of scratch");
    let allowed = y_bytes + dx_bytes + h + diagonals + scratch + 16 * MIB + 64 * 1024;
    assert!(peak <= allowed, "{what}: a peak of {peak} over {allowed}");
    // Nothing that is allocated is as large as the weight: a panel is at most half of it, and the
    // GEMM's packed copy of one is a page larger.
    let half = f32s(inputs * outputs) / 2;
    if half >= 2 * MIB && half > y_bytes.max(dx_bytes) {
        assert!(largest <= half + 8 * 1024, "{what}: one piece of {largest} bytes");
    }
}

/// One test, since the counters are the process's.
#[test]
fn nothing_of_the_weights_size_exists() {
    use Way::{Factored, Panel};
    for ways in [(Panel, Panel), (Panel, Factored), (Factored, Panel), (Factored, Factored)] {
        for (inputs, outputs) in [(1024, 1024), (768, 3072), (3072, 768)] {
            check(16, inputs, outputs, 32, ways, 0.0);
        }
        check(300, 256, 512, 32, ways, 0.0);
        check(300, 512, 256, 32, ways, 0.0);
        check(1, 2048, 2048, 64, ways, 0.0);
    }
    for ways in [(Panel, Panel), (Factored, Factored)] {
        check(8, 8192, 1024, 64, ways, 0.0);
        check(300, 1024, 2048, 32, ways, 0.1);
        check(300, 2048, 1024, 32, ways, 0.1);
    }
    check(8, 8192, 8192, 512, (Factored, Factored), 0.0);
}
