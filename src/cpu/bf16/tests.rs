use super::*;
use crate::device::Device;
use crate::dtype::{BF16, Element};
use micro::{Emulated, Order};
use proptest::prelude::*;

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut words = vec![0; len];
    crate::random::words(seed, 0, 0, &mut words);
    words.into_iter().map(|word| crate::random::symmetric(word) as f32).collect()
}

/// A product by some kernel, on its device.
type Product = fn(&Device, f32, Mat<'_, f32>, Mat<'_, f32>, Onto<'_, f32>, MatMut<'_, f32>) -> Result<()>;

/// By emulation, in the order of vectors, and in that of tiles.
const BY_PAIRS: Product =
    |device, alpha, a, b, onto, c| product(Emulated::<8>(Order::Pairs), device.host(), alpha, a, b, onto, c);
const BY_TILES: Product =
    |device, alpha, a, b, onto, c| product(Emulated::<32>(Order::Tiles), device.host(), alpha, a, b, onto, c);

/// The kernels of this processor, each with the emulation that has its bits.
fn native() -> Vec<(&'static str, Product, Product)> {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut all: Vec<(_, Product, _)> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if x86::Avx512::detect().is_some() {
            let by: Product = |device, alpha, a, b, onto, c| {
                product(x86::Avx512::detect().unwrap(), device.host(), alpha, a, b, onto, c)
            };
            all.push(("AVX512-BF16", by, BY_PAIRS));
        }
        if x86::Amx::detect().is_some() {
            let by: Product = |device, alpha, a, b, onto, c| {
                product(x86::Amx::detect().unwrap(), device.host(), alpha, a, b, onto, c)
            };
            all.push(("AMX", by, BY_TILES));
        }
    }
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A matrix of any form within its slice.
#[derive(Clone, Copy, Debug)]
struct Form {
    rows: usize,
    cols: usize,
    turned: bool,
    pad: usize,
    step: usize,
}

impl Form {
    /// The strides.
    fn strides(self) -> (usize, usize) {
        let line = if self.turned { self.rows } else { self.cols } * self.step + self.pad;
        if self.turned { (self.step, line) } else { (line, self.step) }
    }

    fn random(self, seed: u64) -> Vec<f32> {
        let lines = if self.turned { self.cols } else { self.rows };
        let (row, col) = self.strides();
        random(lines * row.max(col), seed)
    }

    fn view(self, data: &[f32]) -> Mat<'_, f32> {
        let (row, col) = self.strides();
        Mat { data, rows: self.rows, cols: self.cols, row, col }
    }

    fn view_mut(self, data: &mut [f32]) -> MatMut<'_, f32> {
        let (row, col) = self.strides();
        MatMut { data, rows: self.rows, cols: self.cols, row, col }
    }
}

/// The slow twin: factors rounded as tensors are, sums in f64.
fn naive(alpha: f32, a: Mat<'_, f32>, b: Mat<'_, f32>, beta: f32, c: MatMut<'_, f32>) {
    let round = |x: f32| BF16::from_f64(x as f64).to_f64();
    for i in 0..c.rows {
        for j in 0..c.cols {
            let term = |k: usize| round(a.data[i * a.row + k * a.col]) * round(b.data[k * b.row + j * b.col]);
            let dot: f64 = (0..a.cols).map(term).sum();
            let at = &mut c.data[i * c.row + j * c.col];
            *at = (alpha as f64 * dot + if beta == 0.0 { 0.0 } else { beta as f64 * *at as f64 }) as f32;
        }
    }
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..20, Just(48), Just(96), 90usize..200]
}

fn form() -> impl Strategy<Value = (bool, usize, usize)> {
    (any::<bool>(), 0usize..3, prop_oneof![4 => Just(1usize), 1 => Just(2usize)])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// And the instructions, where there are any, give the bits of the emulation.
    #[test]
    fn equals_the_slow_twin(
        (m, n) in (size(), size()),
        k in prop_oneof![4 => size(), 1 => 380usize..400, 1 => 760usize..780, 1 => 1530usize..1550],
        (fa, fb, fc) in (form(), form(), form()),
        beta in prop_oneof![Just(0.0f32), Just(1.0), Just(-0.5)],
        bias in any::<bool>(),
    ) {
        let form = |rows, cols, (turned, pad, step)| Form { rows, cols, turned, pad, step };
        let (fa, fb, fc) = (form(m, k, fa), form(k, n, fb), form(m, n, fc));
        let (a, b, mut start, row) = (fa.random(1), fb.random(2), fc.random(3), random(n, 4));
        let each = |data: &mut [f32], f: &dyn Fn(usize, &mut f32)| {
            let c = fc.view_mut(data);
            (0..m).for_each(|i| (0..n).for_each(|j| f(j, &mut c.data[i * c.row + j * c.col])));
        };
        let (mut want, mut onto) = (start.clone(), Onto::Itself(beta));
        if bias {
            onto = Onto::Row(&row);
            each(&mut want, &|j, c| *c = row[j]);
        }
        if bias || beta == 0.0 {
            // It is not read then, but what lies between the elements is left alone.
            each(&mut start, &|_, c| *c = f32::NAN);
        }
        naive(0.7, fa.view(&a), fb.view(&b), if bias { 1.0 } else { beta }, fc.view_mut(&mut want));
        let device = Device::cpu();
        let run = |by: Product| {
            let mut got = start.clone();
            by(&device, 0.7, fa.view(&a), fb.view(&b), onto, fc.view_mut(&mut got)).unwrap();
            got
        };
        for by in [BY_PAIRS, BY_TILES] {
            for (g, w) in run(by).iter().zip(&want) {
                // Numbers below 1 in size, summed in f32.
                prop_assert!((g - w).abs() < 2e-7 * (k as f32 + 10.0), "{g} {w}");
            }
        }
        for (name, by, emulated) in native() {
            prop_assert!(bits(&run(by)) == bits(&run(emulated)), "{name}");
        }
    }
}

/// Shapes that are cut in every direction.
const CUT: [(usize, usize, usize); 3] = [(200, 3100, 50), (97, 100, 800), (333, 144, 385)];

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let device = Device::cpu();
    let all = [BY_PAIRS, BY_TILES].into_iter().chain(native().into_iter().map(|(_, by, _)| by));
    for (by, (m, n, k)) in all.flat_map(|by| CUT.map(|cut| (by, cut))) {
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut c = vec![0.0; m * n];
            pool.install(|| {
                let (a, b) = (Mat::new(&a, k, m).t(), Mat::new(&b, n, k).t());
                by(&device, 1.0, a, b, Onto::Itself(0.0), MatMut::new(&mut c, m, n)).unwrap();
            });
            bits(&c)
        };
        let one = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one), "{m}×{n}×{k}");
    }
}

/// Where the processor has the instructions they give the bits that the emulation gives, for all kinds
/// of numbers. (Elsewhere there is nothing to compare; see the module's documentation.)
#[test]
fn instructions_give_the_bits_of_their_emulation() {
    let (device, native) = (Device::cpu(), native());
    if native.is_empty() {
        eprintln!("skipped: no instructions for bf16 on this processor");
    }
    for ((m, n, k), (name, by, emulated_by)) in
        CUT.into_iter().flat_map(|cut| native.iter().map(move |of| (cut, of)))
    {
        // Of every size that a product leaves within f32, denormals included.
        let numbers = |len, seed| -> Vec<f32> {
            let scale = |i: usize| 2f32.powi(i as i32 * 7 % 126 - 63);
            let tiny = |i: usize| if i.is_multiple_of(11) { 1e-39 } else { 1.0 };
            random(len, seed).iter().enumerate().map(|(i, x)| x * scale(i) * tiny(i)).collect()
        };
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let (mut real, mut emulated) = (vec![0.5; m * n], vec![0.5; m * n]);
        let (a, b, onto) = (Mat::new(&a, m, k), Mat::new(&b, k, n), Onto::Itself(1.0));
        by(&device, 1.5, a, b, onto, MatMut::new(&mut real, m, n)).unwrap();
        emulated_by(&device, 1.5, a, b, onto, MatMut::new(&mut emulated, m, n)).unwrap();
        assert!(bits(&real) == bits(&emulated), "{name}: {m}×{n}×{k}");
    }
}

/// c of a layer's product on a device.
fn layer<T: LayerGemm + Element>(device: &Device, m: usize, n: usize, k: usize) -> Vec<T> {
    let numbers = |len, seed| random(len, seed).iter().map(|&x| T::from_f64(x as f64)).collect::<Vec<T>>();
    let (a, b, mut c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * n, 3));
    let (one, half) = (T::from_f64(1.0), T::from_f64(0.5));
    let c_mat = MatMut::new(&mut c, m, n);
    T::layer_gemm(device.host(), one, Mat::new(&a, m, k), Mat::new(&b, k, n), Onto::Itself(half), c_mat)
        .unwrap();
    c
}

#[test]
fn only_large_products_in_f32_are_rounded_and_only_where_asked() {
    let (f32, bf16) = (Device::cpu(), Device::emulating_bf16());
    assert_eq!((f32.precision(), bf16.precision()), (Precision::F32, Precision::Bf16));
    let (plain, rounded) = (layer::<f32>(&f32, 64, 64, 30), layer::<f32>(&bf16, 64, 64, 30));
    assert_ne!(plain, rounded);
    assert!(plain.iter().zip(&rounded).all(|(p, r)| (p - r).abs() < 0.05));
    for (m, n, k) in [(63, 64, 30), (64, 63, 30), (64, 64, 0)] {
        assert_eq!(layer::<f32>(&bf16, m, n, k), layer::<f32>(&f32, m, n, k));
    }
    assert_eq!(layer::<f64>(&bf16, 64, 64, 30), layer::<f64>(&f32, 64, 64, 30));
}

/// What a device computes layers in bf16 with: the tiles before all else, vectors where they are faster than f32.
#[test]
fn the_fastest_kernel_is_taken() {
    #[cfg(not(target_arch = "x86_64"))]
    let emulated: Option<Product> = None;
    #[cfg(target_arch = "x86_64")]
    let emulated = match x86::fastest() {
        Some(x86::Fastest::Amx(_)) => Some(BY_TILES),
        Some(x86::Fastest::Avx512(_)) => Some(BY_PAIRS),
        None => None,
    };
    #[cfg(target_arch = "x86_64")]
    assert_eq!(matches!(x86::fastest(), Some(x86::Fastest::Amx(_))), x86::Amx::detect().is_some());
    assert_eq!(emulated.is_some(), Precision::Bf16.is_native());
    let (m, n, k) = (70, 90, 50);
    let got = layer::<f32>(&Device::with_precision(Precision::Bf16), m, n, k);
    let want = match emulated {
        None => layer::<f32>(&Device::cpu(), m, n, k),
        Some(by) => {
            let (a, b, mut c) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
            let (a, b, device) = (Mat::new(&a, m, k), Mat::new(&b, k, n), Device::cpu());
            by(&device, 1.0, a, b, Onto::Itself(0.5), MatMut::new(&mut c, m, n)).unwrap();
            c
        }
    };
    assert!(bits(&got) == bits(&want));
}

#[test]
fn packing_leaves_nothing_behind() {
    let device = Device::emulating_bf16();
    layer::<f32>(&device, 200, 200, 400);
    let after_one = device.memory();
    assert_eq!(after_one.live_bytes, 0);
    layer::<f32>(&device, 200, 200, 400);
    assert_eq!(device.memory().peak_bytes, after_one.peak_bytes);
}
