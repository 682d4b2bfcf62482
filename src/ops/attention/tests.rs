//! The cases of attention with their slow twin, and what no case can show.

use super::*;
use crate::cpu::naive::Naive;
use crate::ops::cases::Case;
use crate::ops::dropout::mask_range;
use crate::{DType, Device};

/// Attention by plain loops over queries and keys.
fn twin(x: &[Naive], options: &AttentionOptions) -> Naive {
    let (q, k, v) = (&x[0], &x[1], &x[2]);
    let (heads, t, d) = (q.dims[1], q.dims[2], q.dims[3]);
    let (group, tk) = (heads / k.dims[1].max(1), k.dims[2]);
    let scale = options.scale.unwrap_or(1.0 / (d.max(1) as f64).sqrt());
    let sees = |b: usize, i: usize, j: usize| {
        (!options.causal || j + t <= i + tk) && options.keys.as_ref().is_none_or(|keys| keys[b * tk + j])
    };
    Naive::build(&[q.dims[0], heads, t, v.dims[3]], |at| {
        let &[b, h, i, column] = at else { unreachable!() };
        let kv = h / group;
        let score =
            |j: usize| scale * (0..d).map(|c| q.at(&[b, h, i, c]) * k.at(&[b, kv, j, c])).sum::<f64>();
        let weights: Vec<f64> = (0..tk).map(|j| if sees(b, i, j) { score(j).exp() } else { 0.0 }).collect();
        let total: f64 = weights.iter().sum();
        let mut mask = vec![1.0; tk];
        if let Some((p, key)) = options.dropout {
            mask_range(key, p, (((b * heads + h) * t + i) * tk) as u64, &mut mask);
        }
        let sum: f64 = (0..tk).map(|j| weights[j] * mask[j] * v.at(&[b, kv, j, column])).sum();
        if total == 0.0 { 0.0 } else { sum / total }
    })
}

/// A mask that hides about a third of the keys, and all of them in every fourth sequence.
fn padding(b: usize, tk: usize) -> Option<Arc<[bool]>> {
    Some((0..b * tk).map(|i| (i * i + i / 3) % 3 != 1 && i / tk % 4 != 3).collect())
}

pub(crate) fn cases() -> Vec<Case> {
    const OWN: &[&str] = &["b h t d", "b h k d", "b h k e"];
    const SHARED: &[&str] = &["b 4 t d", "b 2 k d", "b 2 k e"];
    const UNASKED: &[&str] = &["b 0 t d", "b 2 k d", "b 2 k e"];
    const LONG: &[&str] = &["1 2 150 3", "1 1 130 3", "1 1 130 2"];
    const KEY: DropoutKey = DropoutKey { seed: 1, step: 2, site: 3 };
    type Options = AttentionOptions;
    // With a few keys the differences that the gradient of the scores is made of may nearly vanish: f32 then shows
    // little but rounding (1.07e-5 was met). The case of fixed size takes no more than all others.
    let case = |name, inputs, options: fn(usize, usize) -> Options| {
        Case::new(
            name,
            inputs,
            move |x| x[0].attention(x[1], x[2], &options(x[1].dims()[0], x[1].dims()[2])),
            move |x| twin(x, &options(x[1].dims[0], x[1].dims[2])),
        )
        .f32_tolerance(1e-4)
    };
    vec![
        case("attention", OWN, |_, _| Options::default()),
        case("attention, scale", OWN, |_, _| Options { scale: Some(0.4), ..Options::default() }),
        case("attention, padding", OWN, |b, tk| Options { keys: padding(b, tk), ..Options::default() }),
        case("attention, causal", OWN, |_, _| Options { causal: true, ..Options::default() }),
        case("attention, dropout", OWN, |_, _| Options { dropout: Some((0.3, KEY)), ..Options::default() }),
        case("attention, shared heads", SHARED, |_, _| Options::default()),
        case("attention, no queries' heads", UNASKED, |_, _| Options::default()),
        case("attention, all at once", SHARED, |b, tk| Options {
            scale: Some(0.6),
            causal: true,
            keys: padding(b, tk),
            dropout: Some((0.2, KEY)),
        }),
        case("attention, several blocks", LONG, |b, tk| Options {
            causal: true,
            keys: padding(b, tk),
            dropout: Some((0.2, KEY)),
            ..Options::default()
        })
        .f32_tolerance(1e-5),
    ]
}

fn random(dims: &[usize], seed: u64) -> Result<Tensor> {
    let mut words = vec![0; dims.iter().product()];
    crate::random::words(seed, 0, 0, &mut words);
    Tensor::from_vec(words.into_iter().map(crate::random::normal).collect(), dims, &Device::cpu())
}

/// Queries without a key, and keys that nobody may attend to, get zeros to the last bit.
#[test]
fn what_sees_nothing_gets_nothing() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let make = |dims: &[usize], seed| Ok(random(dims, seed)?.to_dtype(dtype)?.track());
        let (q, k, v) = (make(&[1, 1, 4, 3], 1)?, make(&[1, 1, 3, 3], 2)?, make(&[1, 1, 3, 2], 3)?);
        let keys = Some(Arc::from([true, true, false]));
        let y = q.attention(&k, &v, &AttentionOptions { causal: true, keys, ..Default::default() })?;
        let gradients = y.backward_from(&Tensor::ones(y.shape(), dtype, y.device())?)?;
        let part = |x: &Tensor, i: usize| x.select(2, i)?.to_dtype(DType::F64)?.to_vec::<f64>();
        let (dq, dk, dv) = (gradients.of(&q)?, gradients.of(&k)?, gradients.of(&v)?);
        assert_eq!((part(&y, 0)?, part(dq, 0)?), (vec![0.0; 2], vec![0.0; 3]));
        assert_eq!((part(dk, 2)?, part(dv, 2)?), (vec![0.0; 3], vec![0.0; 2]));
        // Two queries see the first key alone or both; what they see counts.
        assert!(part(dv, 0)?.iter().all(|&d| d > 1.0));
    }
    Ok(())
}

/// No more than two blocks of probabilities exist at one time on each of two threads.
#[test]
fn scratch_is_a_few_blocks() -> Result<()> {
    let device = Device::cpu();
    let x = Tensor::ones([1, 2, 1000, 2], DType::F32, &device)?.track();
    device.reset_peaks();
    let y = x.attention(&x, &x, &AttentionOptions::default())?;
    y.backward_from(&y.detach())?;
    let (scratch, probabilities) = (device.memory().scratch_peak_bytes, 2 * 1000 * 1000 * 4);
    assert!(scratch < probabilities / 7, "{scratch}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let x = |dims: &[usize]| random(dims, 1);
    let q = x(&[2, 4, 3, 5])?;
    let none = AttentionOptions::default();
    let shape = |r: Result<Tensor>| matches!(r, Err(Error::Shape { .. }));
    assert!(shape(q.attention(&x(&[2, 3, 3, 5])?, &x(&[2, 3, 3, 5])?, &none)));
    assert!(shape(q.attention(&x(&[2, 0, 3, 5])?, &x(&[2, 0, 3, 5])?, &none)));
    assert!(shape(q.attention(&x(&[2, 4, 3, 6])?, &x(&[2, 4, 3, 5])?, &none)));
    assert!(shape(q.attention(&x(&[2, 4, 3, 5])?, &x(&[2, 4, 2, 5])?, &none)));
    assert!(shape(q.attention(&x(&[1, 4, 3, 5])?, &x(&[1, 4, 3, 5])?, &none)));
    assert!(shape(q.attention(&q, &x(&[4, 3, 5])?, &none)));
    assert!(shape(q.attention(&q, &q, &AttentionOptions { keys: Some(Arc::from([true])), ..none.clone() })));
    let narrow = q.to_dtype(DType::F32)?;
    assert!(matches!(q.attention(&q, &narrow, &none), Err(Error::DType { .. })));
    let key = DropoutKey { seed: 0, step: 0, site: 0 };
    let all = AttentionOptions { dropout: Some((1.0, key)), ..none };
    assert!(matches!(q.attention(&q, &q, &all), Err(Error::Config { .. })));
    Ok(())
}
