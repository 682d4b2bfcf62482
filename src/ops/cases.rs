//! One list of cases drives every check of every operation: the gradient against a central
//! difference in f64, the value against the slow twin, f32 against f64, with sizes of 0 and 1,
//! views with strides, and broadcast inputs. See also `checks` below.

use std::collections::HashMap;

use proptest::prelude::*;

use crate::cpu::naive::Naive;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gradcheck;
use crate::random;
use crate::tensor::Tensor;

/// An operation with inputs to try it on.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// For each input its dimensions: a letter stands for any size, the same letter for the same
    /// size, a number for itself.
    inputs: &'static [&'static str],
    domain: Domain,
    broadcasts: bool,
    smallest: usize,
    tolerance: f64,
    frozen: Option<usize>,
    run: Run,
    naive: Twin,
}

type Run = Box<dyn Fn(&[&Tensor]) -> Result<Tensor> + Send + Sync>;
type Twin = Box<dyn Fn(&[Naive]) -> Naive + Send + Sync>;

/// The numbers that an operation is tried on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Domain {
    /// −2 to 2.
    Any,
    /// 0.3 to 2.3.
    Positive,
    /// −2 to 2 without −0.2 to 0.2.
    NotZero,
}

impl Case {
    pub(crate) fn new(
        name: &'static str,
        inputs: &'static [&'static str],
        run: impl Fn(&[&Tensor]) -> Result<Tensor> + Send + Sync + 'static,
        naive: impl Fn(&[Naive]) -> Naive + Send + Sync + 'static,
    ) -> Case {
        let (run, naive) = (Box::new(run), Box::new(naive));
        Case {
            name,
            inputs,
            domain: Domain::Any,
            broadcasts: false,
            smallest: 0,
            tolerance: 1e-5,
            frozen: None,
            run,
            naive,
        }
    }

    pub(crate) fn domain(self, domain: Domain) -> Case {
        Case { domain, ..self }
    }

    /// The inputs broadcast against each other: try sizes of 1 in each.
    pub(crate) fn broadcasts(self) -> Case {
        Case { broadcasts: true, ..self }
    }

    /// The smallest size that makes sense (a maximum over nothing does not).
    pub(crate) fn at_least(self, smallest: usize) -> Case {
        Case { smallest, ..self }
    }

    /// How far f32 may be from f64, relative to the largest number. Say why where it is used.
    pub(crate) fn f32_tolerance(self, tolerance: f64) -> Case {
        Case { tolerance, ..self }
    }

    /// An input that no gradient is wanted for.
    pub(crate) fn frozen(self, input: usize) -> Case {
        Case { frozen: Some(input), ..self }
    }

    /// The dimensions of each input with these sizes for the letters, in order of appearance.
    fn dims(&self, sizes: &[usize], seed: u64) -> Vec<Vec<usize>> {
        let mut letters: HashMap<&str, usize> = HashMap::new();
        let mut place = 0;
        let mut dims = Vec::new();
        for input in self.inputs {
            let mut of_input = Vec::new();
            for letter in input.split_whitespace() {
                let next = sizes[letters.len() % sizes.len()].max(self.smallest);
                let size = letter.parse().unwrap_or_else(|_| *letters.entry(letter).or_insert(next));
                place += 1;
                let shrink = self.broadcasts && random::mix(seed, place).is_multiple_of(4);
                of_input.push(if shrink { 1 } else { size });
            }
            dims.push(of_input);
        }
        dims
    }

    fn values(&self, n: usize, seed: u64) -> Vec<f64> {
        let mut words = vec![0; n];
        random::words(seed, 0, 0, &mut words);
        let value = |w| match (self.domain, 2.0 * random::symmetric(w)) {
            (Domain::Any, x) => x,
            (Domain::Positive, x) => 1.3 + x / 2.0,
            (Domain::NotZero, x) => x.signum() * (0.2 + 0.9 * x.abs()),
        };
        words.into_iter().map(value).collect()
    }
}

/// The values under the dims, laid out in memory in one of several ways: in order, with the
/// dimensions in another order, or as a part of something larger.
fn lay_out(values: &[f64], dims: &[usize], dtype: DType, way: u64, device: &Device) -> Result<Tensor> {
    let plain = Tensor::from_slice(values, dims, &Device::cpu())?.to_dtype(dtype)?.to_device(device)?;
    let rank = dims.len();
    match way % 3 {
        1 if rank > 1 => {
            let mut order: Vec<usize> = (0..rank).collect();
            order.rotate_left(way as usize / 3 % rank);
            let mut back = vec![0; rank];
            order.iter().enumerate().for_each(|(i, &d)| back[d] = i);
            crate::compute::contiguous(&plain.permute(&order)?)?.permute(&back)
        }
        2 if rank > 0 => {
            let dim = way as usize / 3 % rank;
            let pad = plain.slice(dim, 0..dims[dim].min(1))?.add_scalar(9.0)?;
            Tensor::concat(&[&pad, &plain, &pad], dim)?
                .slice(dim, pad.dims()[dim]..pad.dims()[dim] + dims[dim])
        }
        _ => Ok(plain),
    }
}

/// max|a − b| / max|b|, and NaN where either has one. Relative to 1 at least, the size of the numbers
/// that went in: what is left where they cancel is rounding.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0, |worst, (a, b)| {
        let d = (a - b).abs() / largest;
        if d > worst || d.is_nan() { d } else { worst }
    })
}

fn close(what: &str, a: &Tensor, b: &[f64], tolerance: f64) -> std::result::Result<(), TestCaseError> {
    let a = a.to_dtype(DType::F64).and_then(|a| a.to_vec::<f64>()).map_err(fail)?;
    prop_assert_eq!(a.len(), b.len(), "{}", what);
    let d = distance(&a, b);
    prop_assert!(d <= tolerance, "{what}: relative distance {d:e} over {tolerance:e}");
    Ok(())
}

fn fail(e: Error) -> TestCaseError {
    TestCaseError::fail(e.to_string())
}

/// Whether a gradient that repeats one number by strides of 0 gives what the numbers written out give.
fn one_repeated(x: &[Tensor], tracked: &[bool], run: &impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<bool> {
    let gradients = |written_out: bool| -> Result<Vec<Vec<f64>>> {
        let x: Vec<Tensor> =
            x.iter().zip(tracked).map(|(x, &t)| if t { x.track() } else { x.clone() }).collect();
        let y = run(&x)?;
        let one = Tensor::scalar(1.5, y.dtype(), y.device())?.broadcast_to(y.shape())?;
        let g = y.backward_from(&if written_out { one.contiguous()? } else { one })?;
        x.iter().filter_map(|x| g.of(x).ok()).map(Tensor::to_vec).collect()
    };
    Ok(gradients(true)?.iter().zip(&gradients(false)?).all(|(a, b)| distance(a, b) <= 1e-12))
}

/// Everything that is checked of one case with one choice of sizes, values and layouts.
fn check(case: &Case, sizes: &[usize], seed: u64) -> std::result::Result<(), TestCaseError> {
    let dims = case.dims(sizes, seed);
    let values: Vec<Vec<f64>> = dims
        .iter()
        .enumerate()
        .map(|(i, d)| case.values(d.iter().product(), random::mix(seed, 100 + i as u64)))
        .collect();
    let make = |dtype| -> Result<Vec<Tensor>> {
        let ways = (0..).map(|i| random::mix(seed, 200 + i));
        let cpu = Device::cpu();
        dims.iter().zip(&values).zip(ways).map(|((d, v), way)| lay_out(v, d, dtype, way, &cpu)).collect()
    };
    let run = |x: &[Tensor]| (case.run)(&x.iter().collect::<Vec<_>>());
    let what = format!("{} on {dims:?}", case.name);

    let naive: Vec<Naive> =
        dims.iter().zip(&values).map(|(d, v)| Naive { dims: d.clone(), data: v.clone() }).collect();
    let want = (case.naive)(&naive);
    let wide = make(DType::F64).map_err(fail)?;
    let y = run(&wide).map_err(fail)?;
    prop_assert_eq!(y.dims(), &want.dims[..], "{}", what);
    close(&format!("{what}, the slow twin"), &y, &want.data, 1e-12)?;

    let narrow = make(DType::F32).map_err(fail)?;
    close(&format!("{what}, f32"), &run(&narrow).map_err(fail)?, &want.data, case.tolerance)?;

    // Any subset of the inputs may be frozen: the mask must not change the others' gradients.
    let all: Vec<bool> = (0..dims.len()).map(|i| case.frozen != Some(i)).collect();
    let mask =
        (0..dims.len()).map(|i| all[i] && !random::mix(seed, 300 + i as u64).is_multiple_of(3)).collect();
    for tracked in [all, mask] {
        if !tracked.contains(&true) {
            continue;
        }
        gradcheck::function(&what, |x: &[Tensor]| run(x))
            .frozen(&tracked.iter().map(|t| !t).collect::<Vec<_>>())
            .seeds(seed..seed + 2)
            .check(&wide)
            .map_err(fail)?;
        let gradients = |x: &[Tensor]| -> Result<Vec<Option<Tensor>>> {
            let x: Vec<Tensor> =
                x.iter().zip(&tracked).map(|(x, &t)| if t { x.track() } else { x.clone() }).collect();
            let y = run(&x)?;
            let dy = case.values(y.numel(), seed ^ 1);
            let g =
                y.backward_from(&lay_out(&dy, y.dims(), y.dtype(), random::mix(seed, 400), y.device())?)?;
            Ok(x.iter().map(|x| g.of(x).ok().cloned()).collect())
        };
        prop_assert!(
            one_repeated(&wide, &tracked, &run).map_err(fail)?,
            "{what}: a gradient with strides of 0"
        );
        let (g64, g32) = (gradients(&wide).map_err(fail)?, gradients(&narrow).map_err(fail)?);
        for (i, (g64, g32)) in g64.iter().zip(&g32).enumerate() {
            let (Some(g64), Some(g32)) = (g64, g32) else {
                prop_assert!(!tracked[i], "{what}: no gradient for input {i}");
                continue;
            };
            prop_assert_eq!(g64.dims(), &dims[i][..], "{}, gradient {}", what, i);
            let g64 = g64.to_vec::<f64>().map_err(fail)?;
            close(&format!("{what}, gradient {i} in f32"), g32, &g64, case.tolerance)?;
        }
    }
    Ok(())
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0usize), 3 => Just(1usize), 12 => 2usize..6, 1 => 30usize..40]
}

#[test]
fn every_case_passes_every_check() {
    let strategy = (prop::collection::vec(size(), 6), any::<u64>());
    for case in super::cases() {
        let config = ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() };
        let mut runner = proptest::test_runner::TestRunner::new(config);
        if let Err(e) = runner.run(&strategy, |(sizes, seed)| check(&case, &sizes, seed >> 8)) {
            panic!("{}: {e}", case.name);
        }
    }
}

#[test]
fn names_are_unique() {
    let mut names: Vec<_> = super::cases().iter().map(|c| c.name).collect();
    names.sort();
    let n = names.len();
    names.dedup();
    assert_eq!(names.len(), n);
}

/// Value and gradients in f32 on another device next to those on the CPU.
#[cfg(feature = "opencl")]
fn check_on(case: &Case, sizes: &[usize], seed: u64, gpu: &Device) -> std::result::Result<(), TestCaseError> {
    let dims = case.dims(sizes, seed);
    let frozen = |i: usize| case.frozen == Some(i) || random::mix(seed, 300 + i as u64).is_multiple_of(5);
    let on = |device: &Device| -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let input = |i: usize| {
            let values = case.values(dims[i].iter().product(), random::mix(seed, 100 + i as u64));
            let x = lay_out(&values, &dims[i], DType::F32, random::mix(seed, 200 + i as u64), device)?;
            Ok(if frozen(i) { x } else { x.track() })
        };
        let x = (0..dims.len()).map(input).collect::<Result<Vec<_>>>()?;
        let y = (case.run)(&x.iter().collect::<Vec<_>>())?;
        if !y.is_tracked() {
            return Ok((y, vec![]));
        }
        let dy = case.values(y.numel(), seed ^ 1);
        let dy = lay_out(&dy, y.dims(), y.dtype(), random::mix(seed, 400), device)?;
        let gradients = y.backward_from(&dy)?;
        Ok((y, x.iter().map(|x| gradients.of(x).ok().cloned()).collect()))
    };
    let what = format!("{} on {dims:?}", case.name);
    let (want, want_gradients) = on(&Device::cpu()).map_err(fail)?;
    let (y, gradients) = on(gpu).map_err(|e| TestCaseError::fail(format!("{what}: {e}")))?;
    prop_assert!(y.device().is(gpu), "{what}: the result is on {}", y.device());
    prop_assert_eq!(y.dims(), want.dims(), "{}", what);
    let values = |x: &Tensor| x.to_device(&Device::cpu())?.to_dtype(DType::F64)?.to_vec::<f64>();
    close(&what, &y.to_device(&Device::cpu()).map_err(fail)?, &values(&want).map_err(fail)?, case.tolerance)?;
    prop_assert_eq!(gradients.len(), want_gradients.len());
    for (i, (g, want)) in gradients.iter().zip(&want_gradients).enumerate() {
        let (Some(g), Some(want)) = (g, want) else {
            prop_assert!(g.is_none() && want.is_none(), "{what}: gradient {i} on one device only");
            continue;
        };
        let (g, want) = (g.to_device(&Device::cpu()).map_err(fail)?, values(want).map_err(fail)?);
        close(&format!("{what}, gradient {i}"), &g, &want, case.tolerance)?;
    }
    Ok(())
}

/// Operations that have no kernel and go through the host.
#[cfg(feature = "opencl")]
const WITHOUT_KERNEL: &[&str] = &["fastfood", "random sum", "to_dtype"];

#[test]
#[cfg(feature = "opencl")]
fn every_case_on_opencl_is_what_it_is_on_the_cpu() {
    let Some(gpu) = crate::opencl::tests::device() else { return };
    let strategy = (prop::collection::vec(size(), 6), any::<u64>());
    for case in super::cases() {
        let config = ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() };
        let mut runner = proptest::test_runner::TestRunner::new(config);
        if let Err(e) = runner.run(&strategy, |(sizes, seed)| check_on(&case, &sizes, seed >> 8, &gpu)) {
            panic!("{}: {e}", case.name);
        }
    }
    let taken: Vec<_> = gpu.round_trips().into_keys().collect();
    assert!(taken.iter().all(|op| WITHOUT_KERNEL.contains(op)), "without a kernel: {taken:?}");
}
