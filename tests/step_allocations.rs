//! What a training step of an adapted model allocates once it is warm: as much as it gives back, most buffers out
//! of the device's pool, and the rest in proportion to the nodes of the graph.
//!
//! Not every buffer can come out of the pool: it keeps no more than was in use at one time, and a step's buffers of
//! all sizes together are more than that.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use randlora::adapters::{self, Distribution, RandLora, Targets};
use randlora::models::{Vit, VitConfig};
use randlora::nn::{Activation, Context, Init};
use randlora::optim::{AdamW, Optimizer, clip_gradients};
use randlora::{Device, Result, Structure, Tensor};

/// Counts what is allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static SMALL: AtomicUsize = AtomicUsize::new(0);
static LARGE: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

/// From here on an allocation is one of numbers: the device pools buffers of 2048 elements and more.
const NUMBERS: usize = 8 * 1024;

fn grew(layout: Layout) {
    LIVE.fetch_add(layout.size(), Relaxed);
    // The crates that multiply matrices pack them in memory of their own, aligned for vectors or as bytes.
    // The names of parameters are bytes too.
    if layout.align() >= 32 || layout.align() == 1 {
        BYTES.fetch_add(1, Relaxed);
    } else if layout.size() >= NUMBERS {
        LARGE.fetch_add(1, Relaxed);
        LARGEST.fetch_max(layout.size(), Relaxed);
    } else {
        SMALL.fetch_add(1, Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grew(layout);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grew(layout);
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

/// A vision transformer whose linear layers are adapted, and a batch for it.
fn adapted(device: &Device, distribution: Distribution, structure: Structure) -> Result<(Vit, Tensor)> {
    let config = VitConfig {
        image: 8,
        patch: 2,
        channels: 1,
        width: 144,
        layers: 2,
        heads: 4,
        hidden: 288,
        classes: 10,
        activation: Activation::Gelu,
        eps: 1e-6,
        dropout: 0.1,
        attention_dropout: 0.1,
    };
    let init = Init::seeded(0, device);
    let mut model = Vit::init(&init, config)?;
    let method = RandLora { rank: 8, dropout: 0.1, distribution, structure, ..RandLora::default() };
    adapters::attach(&mut model, &method, &Targets::AllLinear, &["classifier"])?;
    Ok((model, init.normal("images", [32, 1, 8, 8], 1.0)?))
}

fn steps(distribution: Distribution, structure: Structure) -> Result<()> {
    let what = format!("{distribution:?}, {structure:?}");
    let device = Device::cpu();
    let (mut model, images) = adapted(&device, distribution, structure)?;
    let labels: Vec<u32> = (0..32).map(|i| i % 10).collect();
    let mut optimizer = AdamW::new();
    let mut step = |i: u64| -> Result<()> {
        let loss = model.forward(&images, &Context::train(0, i))?.cross_entropy(&labels, None, 0.0)?;
        let mut gradients = loss.backward()?;
        clip_gradients(&model, &mut gradients, 1.0, i as usize)?;
        optimizer.step(&mut model, &gradients, 1e-3)
    };
    // The pool fills, the optimiser makes its moments, the GEMM's threads their state.
    (0..4).try_for_each(&mut step)?;
    let nodes = device.nodes_made();
    step(4)?;
    let nodes = device.nodes_made() - nodes;
    let (live, of_device) = (LIVE.load(Relaxed), device.memory());
    [&SMALL, &LARGE, &LARGEST, &BYTES].iter().for_each(|counter| counter.store(0, Relaxed));
    const STEPS: usize = 5;
    (5..5 + STEPS as u64).try_for_each(&mut step)?;
    let [small, large, largest, bytes] = [&SMALL, &LARGE, &LARGEST, &BYTES].map(|c| c.load(Relaxed));
    println!(
        "{what}: {nodes} nodes a step; {} small allocations a step, {} large ones, {} of bytes and of the GEMM crates",
        small / STEPS,
        large as f64 / STEPS as f64,
        bytes / STEPS
    );
    for (kind, count, most) in [("large", large, LARGE_PER_NODE), ("small", small, SMALL_PER_NODE)] {
        let (step, bound) = (count / STEPS, most * nodes);
        assert!(
            step <= bound,
            "{what}: {step} {kind} allocations a step for {nodes} nodes, the largest of {largest} bytes"
        );
    }
    // The test's own threads come and go with a few bytes.
    let now = LIVE.load(Relaxed);
    assert!(now.abs_diff(live) < NUMBERS, "{what}: {live} live bytes before {STEPS} steps, {now} after them");
    let after = device.memory();
    assert_eq!((after.live_bytes, after.kept_bytes), (of_device.live_bytes, of_device.kept_bytes), "{what}");
    Ok(())
}

/// Buffers for each node of the graph that do not come out of the pool: a node has an output, a gradient for each
/// input, and scratch.
const LARGE_PER_NODE: usize = 2;
/// Small allocations for each node of the graph: the operation, the node, its list of parents and what it
/// saves, the tensors, and lists of shapes and of tasks for threads.
const SMALL_PER_NODE: usize = 80;

/// One test, since the counters are the process's. On one thread: how many tasks are queued for others is a
/// matter of chance.
#[test]
fn a_warm_step_keeps_nothing_and_allocates_little() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        for (distribution, structure) in [
            (Distribution::Uniform, Structure::Dense),
            (Distribution::very_sparse(144), Structure::Dense),
            (Distribution::Uniform, Structure::Block),
        ] {
            steps(distribution, structure).unwrap();
        }
    });
}
