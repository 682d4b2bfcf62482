//! What only devices promise; that they compute what the CPU computes, `ops/cases.rs` checks.

use std::sync::{Arc, OnceLock};

use super::View;
use super::gemm::{Stored, gemm, pack};
use super::runtime::{Arg, Grid, Runtime, Source};
use crate::dtype::DType;
use crate::error::Error;
use crate::nn::{Context, Init, Linear, Module};
use crate::ops::dropout::DropoutKey;
use crate::optim::{AdamW, Optimizer, clip_gradients};
use crate::shape::{Layout, Shape};
use crate::{AttentionOptions, Device, Tensor, random};

/// The first device, a new one for each test. None, with a message, where there is none; under CI that is a
/// failure.
pub(crate) fn device() -> Option<Device> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let opened = Device::opencl(0);
    let found = FOUND.get_or_init(|| match &opened {
        Ok(_) => true,
        Err(error) if std::env::var_os("CI").is_some_and(|ci| ci == "true") => panic!("{error}"),
        Err(error) => {
            eprintln!("not tested: {error}");
            false
        }
    });
    opened.ok().filter(|_| *found)
}

fn numbers(dims: &[usize], seed: u64, device: &Device) -> Tensor {
    let mut words = vec![0; dims.iter().product()];
    random::words(seed, 0, 0, &mut words);
    let values: Vec<f32> = words.into_iter().map(|w| random::normal(w) as f32).collect();
    Tensor::from_vec(values, dims, device).unwrap()
}

fn assert_close(got: &Tensor, want: &Tensor, tolerance: f32) {
    let (got, want) = (got.to_vec::<f32>().unwrap(), want.to_vec::<f32>().unwrap());
    let most = want.iter().fold(1f32, |m, x| m.max(x.abs()));
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!((got - want).abs() <= tolerance * most, "{i}: {got} where {want} is right");
    }
}

/// More than one tile in every direction, all strides, and what c holds.
#[test]
fn products_of_several_tiles() {
    let Some(gpu) = device() else { return };
    let cpu = Device::cpu();
    for (m, k, n) in [(1, 1, 1), (33, 70, 65), (130, 17, 31), (64, 300, 129), (5, 0, 3)] {
        let (a, b) = (numbers(&[m, k], 1, &cpu), numbers(&[n, k], 2, &cpu));
        let want = a.matmul(&b.t().unwrap()).unwrap();
        let (a, b) = (a.to_device(&gpu).unwrap(), b.to_device(&gpu).unwrap());
        assert_close(&a.matmul(&b.t().unwrap()).unwrap(), &want, 1e-5);
        assert_close(&b.matmul(&a.t().unwrap()).unwrap(), &want.t().unwrap(), 1e-5);
        let c = numbers(&[m, n], 3, &cpu);
        let (on, to) = (c.to_device(&gpu).unwrap(), Layout::contiguous(Shape::new(&[m, n]).unwrap()));
        let right = b.t().unwrap();
        gemm(0.5, a.cl().unwrap(), (right.cl().unwrap(), DType::F32), 2.0, (on.cl().unwrap().data, &to))
            .unwrap();
        let want = want.scale(0.5).unwrap().add(&c.scale(2.0).unwrap()).unwrap();
        assert_close(&on, &want, 1e-5);
    }
}

/// All tiles of all kinds, in batches beyond what CUDA counts in its second and third dimension.
#[test]
fn products_of_many_batches_and_large_tiles() {
    let Some(gpu) = device() else { return };
    let cpu = Device::cpu();
    for (batch, m, k, n) in [(70_000, 2, 3, 1), (3, 256, 40, 192), (1, 200, 33, 300), (2, 127, 16, 512)] {
        let (a, b) = (numbers(&[batch, m, k], 1, &cpu), numbers(&[batch, n, k], 2, &cpu));
        let turned = |b: &Tensor| b.permute(&[0, 2, 1]).unwrap();
        let want = a.matmul(&turned(&b)).unwrap();
        let (a, b) = (a.to_device(&gpu).unwrap(), b.to_device(&gpu).unwrap());
        assert_close(&a.matmul(&turned(&b)).unwrap(), &want, 1e-5);
        assert_close(&b.matmul(&turned(&a)).unwrap(), &turned(&want), 1e-5);
        let packed = super::elementwise::contiguous(turned(&b).cl().unwrap(), DType::F32).unwrap();
        let b = Tensor::from_cl(packed, DType::F32, Shape::new(&[batch, k, n]).unwrap(), &gpu);
        assert_close(&a.matmul(&b).unwrap(), &want, 1e-5);
    }
}

/// The tile is chosen by the device and the size, which must not be seen in the bits.
#[test]
fn products_have_the_same_bits_whatever_the_tile() {
    let Some(gpu) = device() else { return };
    let runtime = gpu.runtime().unwrap();
    let (a, b) = (numbers(&[256, 70], 1, &gpu), numbers(&[70, 256], 2, &gpu));
    assert_ne!(runtime.tile([256, 256, 1]), runtime.tile([32, 256, 1]));
    let whole = a.matmul(&b).unwrap().to_vec::<f32>().unwrap();
    let rows: Vec<f32> = (0..256)
        .step_by(32)
        .flat_map(|i| a.slice(0, i..i + 32).unwrap().matmul(&b).unwrap().to_vec::<f32>().unwrap())
        .collect();
    assert!(whole == rows);
}

/// −1, 0 and 1 in two bits each are what they are in f32, by rows and by columns, whole and in parts.
#[test]
fn packed_signs_are_unpacked_as_they_are_read() {
    let Some(gpu) = device() else { return };
    let (rows, width) = (150, 213);
    let sign = |i: usize| [0, 1, -1, 0, -1][(i * 7 + i / 11) % 5];
    let packed = pack((0..rows * width).map(sign), width);
    assert_eq!(
        (packed.len(), packed[0] & 3, packed[0] >> 2 & 3),
        (rows * 14, sign(0) as u32, sign(1) as u32 & 3)
    );
    let packed = super::upload_words(gpu.runtime().unwrap(), packed.into_iter()).unwrap();
    let signs: Vec<f32> = (0..rows * width).map(|i| sign(i) as f32).collect();
    let signs = Tensor::from_vec(signs, [rows, width], &gpu).unwrap();
    let lies = Layout::contiguous(Shape::new(&[rows, 14 * 16]).unwrap()).slice(1, 0..width).unwrap();
    for (top, left, down, across) in
        [(0, 0, 150, 213), (3, 5, 140, 200), (16, 64, 128, 128), (149, 212, 1, 1)]
    {
        let cut = |layout: &Layout| {
            layout.slice(0, top..top + down).unwrap().slice(1, left..left + across).unwrap()
        };
        let part = signs.with_layout(cut(signs.layout()));
        for turned in [false, true] {
            let turn = |layout: Layout| if turned { layout.permute(&[1, 0]).unwrap() } else { layout };
            let (layout, want) = (turn(cut(&lies)), part.with_layout(turn(*part.layout())));
            let x = numbers(&[70, want.dims()[0]], 1, &gpu);
            let y = Tensor::zeros([70, want.dims()[1]], DType::F32, &gpu).unwrap();
            let right = View { data: &packed, layout: &layout };
            gemm(1.0, x.cl().unwrap(), (right, Stored::Ternary), 0.0, (y.cl().unwrap().data, y.layout()))
                .unwrap();
            assert_eq!(y.to_vec::<f32>().unwrap(), x.matmul(&want).unwrap().to_vec::<f32>().unwrap());
        }
    }
}

/// What is undefined in the result's memory must not reach it.
#[test]
fn a_product_onto_nothing_ignores_what_was_there() {
    let Some(gpu) = device() else { return };
    let x = numbers(&[3, 3], 1, &gpu);
    let y = Tensor::full(f64::NAN, [3, 3], DType::F32, &gpu).unwrap();
    let View { data, layout } = y.cl().unwrap();
    gemm(1.0, x.cl().unwrap(), (x.cl().unwrap(), DType::F32), 0.0, (data, layout)).unwrap();
    assert!(y.to_vec::<f32>().unwrap().iter().all(|y| y.is_finite()));
}

/// The view begins where the buffer, rounded up to 256 bytes, has ended.
#[test]
fn a_view_of_nothing_is_read_from_anywhere() {
    let Some(gpu) = device() else { return };
    let rows = Tensor::zeros([2, 33], DType::F32, &gpu).unwrap();
    let nothing = rows.slice(0, 2..2).unwrap();
    assert!(nothing.to_vec::<f32>().unwrap().is_empty());
    assert_eq!(nothing.to_device(&Device::cpu()).unwrap().dims(), [0, 33]);
}

#[test]
fn dropout_has_the_same_bits() {
    let Some(gpu) = device() else { return };
    let key = DropoutKey { seed: u64::MAX - 5, step: 3, site: 9 };
    for (n, p) in [(1, 0.5), (15, 0.1), (16, 0.9), (5000, 0.3)] {
        let x = numbers(&[n], 4, &Device::cpu());
        let want = x.dropout(p, key).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(x.to_device(&gpu).unwrap().dropout(p, key).unwrap().to_vec::<f32>().unwrap(), want);
    }
}

#[test]
fn every_half_is_widened_exactly() {
    let Some(gpu) = device() else { return };
    for dtype in [DType::BF16, DType::F16] {
        let bits: Vec<f32> = (0..=u16::MAX)
            .map(|bits| match dtype {
                DType::BF16 => f32::from_bits((bits as u32) << 16),
                _ => crate::Element::to_f32(crate::F16(bits)),
            })
            .filter(|x| !x.is_nan())
            .collect();
        let stored =
            Tensor::from_slice(&bits, [bits.len()], &Device::cpu()).unwrap().to_dtype(dtype).unwrap();
        let wide = stored.to_device(&gpu).unwrap().to_dtype(DType::F32).unwrap().to_vec::<f32>().unwrap();
        // Devices may flush the subnormal numbers of f32, which bf16 has too; f16's are normal there.
        let equal = |(a, b): (&f32, &f32)| a == b || (b.is_subnormal() && *a == 0.0);
        assert!(wide.iter().zip(&bits).all(equal), "{dtype}");
    }
}

#[test]
fn what_is_on_the_device_is_not_read_by_mistake() {
    let Some(gpu) = device() else { return };
    let (x, host) = (numbers(&[3], 1, &gpu), numbers(&[3], 1, &Device::cpu()));
    let error = x.add(&host).unwrap_err().to_string();
    assert!(error.contains("inputs on OpenCL device") && error.contains("to_device"), "{error}");
    assert!(matches!(x.elements::<f32>(), Err(Error::Config { what: "device", .. })));
    assert_eq!(x.to_vec::<f32>().unwrap(), host.to_vec::<f32>().unwrap());
    let there_and_back = host.track();
    let y = there_and_back.to_device(&gpu).unwrap().scale(3.0).unwrap().sum_all().unwrap();
    let g = y.backward().unwrap().of(&there_and_back).unwrap().to_vec::<f32>().unwrap();
    assert_eq!(g, [3.0; 3]);
}

#[test]
fn a_strict_device_takes_no_way_through_the_host() {
    let Some(gpu) = device() else { return };
    let x = numbers(&[3], 1, &gpu).track();
    // Nothing is computed in f64 there.
    let wide = x.detach().to_dtype(DType::F64).unwrap().track();
    let square = || wide.mul(&wide)?.sum_all();
    let gradients = square().unwrap().backward().unwrap();
    assert!(gradients.of(&wide).unwrap().device().is(&gpu));
    let taken: Vec<_> = gpu.round_trips().into_iter().collect();
    assert_eq!(taken, [("gradient", 1), ("mul", 2), ("sum", 2), ("to_dtype", 1)]);
    gpu.set_strict(true);
    let error = square().unwrap_err().to_string();
    assert!(error.contains("mul: no kernel") && error.contains("set_strict(false)"), "{error}");
    x.mul(&x).unwrap().sum_all().unwrap().backward().unwrap();
}

static BROKEN: Source =
    Source { name: "broken.cl", text: "kernel void nothing(global float *x) { x[0] = missing; }" };
static SOUND: Source =
    Source { name: "sound.cl", text: "kernel void set(global float *x, float y) { x[0] = y; }" };

#[test]
fn what_does_not_build_or_fit_is_an_error() {
    let Some(gpu) = device() else { return };
    let runtime = gpu.runtime().unwrap();
    let buffer = runtime.buffer(4).unwrap();
    let error = runtime.launch(&BROKEN, "nothing", &[Arg::Buffer(&buffer)], Grid::items(1)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("broken.cl: does not build") && text.contains("missing"), "{text}");
    for (kernel, args) in [
        ("absent", &[Arg::Buffer(&buffer), Arg::F32(1.0)][..]),
        ("set", &[Arg::Buffer(&buffer), Arg::U64(1)]),
        ("set", &[Arg::Buffer(&buffer)]),
        ("set", &[Arg::Buffer(&buffer), Arg::F32(1.0), Arg::F32(2.0)]),
    ] {
        let error = runtime.launch(&SOUND, kernel, args, Grid::items(1)).unwrap_err();
        assert!(matches!(error, Error::OpenCl { .. }), "{error}");
    }
    let all = [Arg::Buffer(&buffer), Arg::F32(7.0)];
    runtime.launch(&SOUND, "set", &all, Grid { groups: 1, group: [1; 2] }).unwrap();
    // Also where all were set the last time.
    let error = runtime.launch(&SOUND, "set", &all[..1], Grid::items(1)).unwrap_err().to_string();
    assert!(error.contains("`set` has 2 arguments and got 1"), "{error}");
    let too_many = Grid { groups: 1 << 31, group: [1; 2] };
    assert!(runtime.launch(&SOUND, "set", &all, too_many).unwrap_err().to_string().contains("groups"));
    assert!(matches!(Device::opencl(usize::MAX), Err(Error::OpenCl { .. })));
}

#[test]
fn too_much_memory_is_an_error_with_its_size() {
    let Some(gpu) = device() else { return };
    let runtime = gpu.runtime().unwrap();
    let error = runtime.buffer(runtime.info().largest_buffer.saturating_add(1)).unwrap_err();
    let bytes = runtime.info().largest_buffer + 1;
    assert!(
        matches!(error, Error::OutOfMemory { bytes: b } if b == bytes)
            || matches!(error, Error::OpenCl { .. })
    );
    // Nothing is lost.
    assert_eq!(numbers(&[2], 1, &gpu).to_vec::<f32>().unwrap().len(), 2);
}

#[test]
fn built_programs_are_kept_where_the_caller_says() {
    if device().is_none() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("randlora-cl-{}", std::process::id()));
    let sum = || -> crate::Result<f64> {
        let gpu = Device::opencl_cached(0, &folder)?;
        Tensor::ones([3], DType::F32, &gpu)?.sum_all()?.item()
    };
    assert_eq!(sum().unwrap(), 3.0);
    let kept: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(kept.iter().any(|path| path.to_string_lossy().contains("reduce.cl")), "{kept:?}");
    assert_eq!(sum().unwrap(), 3.0);
    // What is damaged is built again.
    kept.iter().for_each(|path| std::fs::write(path, b"damaged").unwrap());
    assert_eq!(sum().unwrap(), 3.0);
    std::fs::remove_dir_all(&folder).unwrap();
}

/// The same training on both devices, and a pool that no step makes larger.
#[test]
fn a_thousand_steps_leave_the_pool_as_it_is() {
    let Some(gpu) = device() else { return };
    let train = |device: &Device, steps: u64| -> crate::Result<(Vec<f64>, Vec<usize>)> {
        let init = Init::seeded(3, device);
        let mut model = Linear::init(&init, 12, 7, true)?;
        let (x, goal) = (init.normal("x", [9, 12], 1.0)?, vec![1, 0, 6, 2, 3, 4, 5, 0, 1]);
        let mut optimizer = AdamW::new();
        let (mut losses, mut pool) = (vec![], vec![]);
        for step in 0..steps {
            let ctx = Context::train(0, step);
            let y = ctx.dropout(&model.forward(&x, &ctx)?, 0.1)?;
            let loss = y.cross_entropy(&goal, None, 0.1)?;
            losses.push(loss.item()?);
            let mut gradients = loss.backward()?;
            clip_gradients(&model, &mut gradients, 0.5, step as usize)?;
            optimizer.step(&mut model, &gradients, 0.01)?;
            drop((y, loss, gradients));
            let memory = device.memory();
            pool.push(memory.live_bytes + memory.kept_bytes);
        }
        Ok((losses, pool))
    };
    let (want, _) = train(&Device::cpu(), 20).unwrap();
    let (losses, pool) = train(&gpu, 1000).unwrap();
    for (step, (loss, want)) in losses.iter().zip(&want).enumerate() {
        assert!((loss - want).abs() < 1e-4, "step {step}: {loss} where the CPU has {want}");
    }
    assert!(losses[999] < losses[0]);
    assert!(pool[2..].iter().all(|bytes| bytes == &pool[2]), "{} to {}", pool[2], pool[999]);
    assert!(gpu.round_trips().is_empty());
    // The loss and the norm of the gradients: nothing else is waited for.
    assert_eq!(gpu.opencl_counts().waits, 2000);
}

#[test]
fn a_model_goes_there_and_back() {
    let Some(gpu) = device() else { return };
    let mut model = Linear::init(&Init::seeded(1, &Device::cpu()), 5, 4, true).unwrap();
    let before = model.weight().value().to_vec::<f32>().unwrap();
    model.to_device(&gpu).unwrap();
    assert!(model.parameters().iter().all(|(_, p)| p.value().device().is(&gpu)));
    model.to_device(&Device::cpu()).unwrap();
    assert_eq!(model.weight().value().to_vec::<f32>().unwrap(), before);
}

#[test]
fn the_size_of_gradients_is_seen_beyond_f32_squares() {
    let Some(gpu) = device() else { return };
    let x = Tensor::from_vec(vec![3e30f32, 4e30], [2], &gpu).unwrap();
    let squares = super::optim::squares(&[x.cl().unwrap()]).unwrap();
    let found =
        Tensor::from_cl(squares, DType::F32, Shape::new(&[2]).unwrap(), &gpu).to_vec::<f32>().unwrap();
    assert!((found[0] as f64 * (found[1] as f64).sqrt() / 5e30 - 1.0).abs() < 1e-6);
    for bad in [f32::NAN, f32::INFINITY] {
        let x = Tensor::from_vec(vec![1.0, bad, 2.0], [3], &gpu).unwrap();
        let squares = super::optim::squares(&[x.cl().unwrap()]).unwrap();
        let found = Tensor::from_cl(squares, DType::F32, Shape::new(&[2]).unwrap(), &gpu);
        assert!(!((found.to_vec::<f32>().unwrap()[0] as f64).powi(2) * 1.0).is_finite());
    }
}

/// Pinned memory is for devices that do not share the host's, which PoCL does: it is made to say otherwise.
#[test]
fn copies_through_pinned_memory_are_whole() {
    if device().is_none() {
        return;
    }
    let pinned = Runtime::open_as(0, None, |info| info.shares_memory = false).unwrap();
    let runtime = Arc::new(pinned);
    // More than a piece, and more than may be on its way at once.
    let large: Vec<u8> = (0..70 << 20).map(|i: u32| (i ^ i >> 9) as u8).collect();
    for bytes in [&large[..5], &large[..(4 << 20) + 3], &large] {
        let buffers = [(); 2].map(|()| runtime.upload(bytes).unwrap());
        for (buffer, from) in buffers.iter().zip([0, 3]) {
            let mut back = vec![0; bytes.len() - from];
            runtime.download(buffer, from, &mut back).unwrap();
            assert!(back == bytes[from..]);
        }
    }
    assert!(runtime.counts().waits > 6);
}

/// Attention over more keys than fit local memory, with every kind of mask.
#[test]
fn attention_takes_any_number_of_keys() {
    let Some(gpu) = device() else { return };
    gpu.set_strict(true);
    let (b, h, t, tk, d) = (2, 2, 19, 5000, 24);
    let keys: Vec<bool> = (0..b * tk).map(|j| j % 7 != 3 && j < tk + 4500).collect();
    let key = DropoutKey { seed: 4, step: 1, site: 2 };
    for (causal, dropout) in [(true, None), (false, Some((0.3, key)))] {
        let options = AttentionOptions {
            causal,
            dropout,
            keys: Some(keys.clone().into()),
            ..AttentionOptions::default()
        };
        let on = |device: &Device| {
            let [q, k, v] = [(t, 1), (tk, 2), (tk, 3)].map(|(rows, seed)| {
                // Scores whose largest is in no certain tile.
                numbers(&[b, h, rows, d], seed, &Device::cpu())
                    .scale(1.5)
                    .unwrap()
                    .to_device(device)
                    .unwrap()
                    .track()
            });
            let y = q.attention(&k, &v, &options).unwrap();
            let dy = numbers(&[b, h, t, d], 4, device);
            let gradients = y.backward_from(&dy).unwrap();
            let of = |x: &Tensor| gradients.of(x).unwrap().clone();
            [y.detach(), of(&q), of(&k), of(&v)].map(|x| x.to_device(&Device::cpu()).unwrap())
        };
        for (got, want) in on(&gpu).iter().zip(on(&Device::cpu())) {
            assert_close(got, &want, 1e-5);
        }
    }
}
