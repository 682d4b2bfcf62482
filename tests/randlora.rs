//! What RandLoRA promises, seen from outside: full rank, exactness, counts, and errors that help.

use std::sync::Arc;

use randlora::adapters::{self, BasesSpec, Distribution, LayerInfo, Method, RandLora, Start, Targets};
use randlora::nn::{Context, Init, Linear, Module};
use randlora::optim::{AdamW, Optimizer};
use randlora::{
    Bases, DType, Device, DropoutKey, Error, Form, Pairing, RandLoraOptions, Sizes, Structure, Tensor, Way,
    analysis, randlora_linear,
};

const WAYS: [(Way, Way); 4] = [
    (Way::Panel, Way::Panel),
    (Way::Panel, Way::Factored),
    (Way::Factored, Way::Panel),
    (Way::Factored, Way::Factored),
];

fn normal(name: &str, dims: &[usize], dtype: DType) -> Tensor {
    Init::seeded(1, &Device::cpu()).normal(name, dims, 1.0).unwrap().to_dtype(dtype).unwrap()
}

const STRUCTURES: [Structure; 2] = [Structure::Dense, Structure::Block];
/// One of each form that bases are stored in.
const KINDS: [(Distribution, Structure); 3] = [
    (Distribution::Uniform, Structure::Dense),
    (Distribution::Normal, Structure::Block),
    (Distribution::Ternary { sparsity: 20.0 }, Structure::Dense),
];

fn options(
    sizes: Sizes,
    (distribution, structure): (Distribution, Structure),
    dtype: DType,
    ways: Option<(Way, Way)>,
) -> RandLoraOptions {
    let (rank, small, large) = (sizes.rank, sizes.small(), sizes.large());
    let spec = BasesSpec { seed: 5, distribution, structure, rank, small, large, pairing: Pairing::Paper };
    let bases = spec.generate(&Device::cpu()).unwrap().to_dtype(dtype).unwrap();
    RandLoraOptions { bases: Arc::new(bases), scale: 0.5, dropout: None, ways }
}

/// B_i: D×r. Of block bases the rows of the basis, the others zero.
fn basis(sizes: Sizes, options: &RandLoraOptions, i: usize) -> Tensor {
    let b = options.bases.b().unwrap().slice(0, 0..sizes.large()).unwrap();
    if options.bases.structure() == Structure::Dense {
        return b.select(1, i).unwrap();
    }
    let n = sizes.bases();
    let own = |d: usize| if d / sizes.rank % n == i { 1.0 } else { 0.0 };
    let rows: Vec<f64> = (0..sizes.large()).map(own).collect();
    let rows = Tensor::from_vec(rows, [sizes.large(), 1], &Device::cpu()).unwrap();
    b.mul(&rows.to_dtype(b.dtype()).unwrap()).unwrap()
}

/// ΔW from dense matrices: s·Σᵢ Bᵢ Λᵢ A Γᵢ, each factor formed.
fn dense(sizes: Sizes, options: &RandLoraOptions, lambda: &Tensor, gamma: &Tensor) -> Tensor {
    let (n, small, large) = (sizes.bases(), sizes.small(), sizes.large());
    let a = options.bases.a().slice(1, 0..small).unwrap();
    let mut sum = Tensor::zeros([large, small], a.dtype(), a.device()).unwrap();
    for i in 0..n {
        let scaled_b = basis(sizes, options, i).mul(&lambda.select(1, i).unwrap()).unwrap();
        let scaled_a = a.mul(&gamma.select(0, i).unwrap()).unwrap();
        sum = sum.add(&scaled_b.matmul(&scaled_a).unwrap()).unwrap();
    }
    let delta = sum.scale(options.scale).unwrap();
    if sizes.inputs > sizes.outputs { delta.t().unwrap() } else { delta }
}

/// max|a − b| / max|b|.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let wide = |t: &Tensor| t.detach().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
    let (a, b) = (wide(a), wide(b));
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    assert!(a.iter().chain(&b).all(|x| x.is_finite()), "not a number among them");
    let worst = a.iter().zip(&b).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
    if worst == 0.0 { 0.0 } else { worst / largest }
}

/// Output and gradients of x, λ and γ.
fn run(
    x: &Tensor,
    w: &Tensor,
    lambda: &Tensor,
    gamma: &Tensor,
    y: impl Fn(&[Tensor; 3]) -> Tensor,
) -> [Tensor; 4] {
    let tracked = [x.track(), lambda.track(), gamma.track()];
    let y = y(&tracked);
    let dy = normal("dy", y.dims(), w.dtype());
    let gradients = y.backward_from(&dy).unwrap();
    let [dx, dl, dg] = [0, 1, 2].map(|i| gradients.of(&tracked[i]).unwrap().clone());
    [y.detach(), dx, dl, dg]
}

#[test]
fn all_ways_equal_the_dense_formula_in_both_precisions() {
    // Among them: one token and none, r that does not divide, r = 1, r = min, r > min, many chunks.
    for (tokens, inputs, outputs, rank) in [
        (40, 48, 48, 8),
        (40, 33, 70, 7),
        (40, 70, 33, 7),
        (1, 20, 30, 6),
        (0, 20, 30, 6),
        (25, 12, 40, 1),
        (25, 40, 12, 12),
        (25, 12, 40, 17),
        (9000, 5, 9, 2),
        (9000, 9, 5, 2),
        (64, 300, 200, 16),
    ] {
        let sizes = Sizes { tokens, inputs, outputs, rank };
        let wide = DType::F64;
        let (x, w) = (normal("x", &[tokens, inputs], wide), normal("w", &[outputs, inputs], wide));
        let lambda = normal("λ", &[rank, sizes.bases()], wide);
        let gamma = normal("γ", &[sizes.bases(), sizes.small()], wide);
        for kind in KINDS {
            let o = options(sizes, kind, wide, None);
            let want = run(&x, &w, &lambda, &gamma, |[x, l, g]| {
                x.linear(&w.add(&dense(sizes, &o, l, g)).unwrap(), None).unwrap()
            });
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
                let [x, w, lambda, gamma] = [&x, &w, &lambda, &gamma].map(|t| t.to_dtype(dtype).unwrap());
                for ways in WAYS.map(Some).into_iter().chain([None]) {
                    let o = options(sizes, kind, dtype, ways);
                    let got = run(&x, &w, &lambda, &gamma, |[x, l, g]| {
                        randlora_linear(x, &w, None, l, g, &o).unwrap()
                    });
                    for (what, (got, want)) in ["y", "dx", "dλ", "dγ"].iter().zip(got.iter().zip(&want)) {
                        let d = distance(got, want);
                        assert!(d <= tolerance, "{what} of {sizes:?}, {kind:?}, {dtype}, {ways:?}: {d:e}");
                    }
                }
            }
        }
    }
}

/// Very sparse bases against the same numbers stored dense, which one number elsewhere keeps them from being
/// taken for ternary: what is added up in another order is the same to rounding.
#[test]
fn ternary_bases_give_what_they_give_written_out() {
    for (inputs, outputs, rank) in [(200, 260, 16), (260, 200, 16), (150, 150, 7), (130, 400, 140)] {
        let sizes = Sizes { tokens: 150, inputs, outputs, rank };
        let ternary = BasesSpec {
            seed: 3,
            distribution: Distribution::very_sparse(sizes.small()),
            structure: Structure::Dense,
            rank,
            small: sizes.small() + 1,
            large: sizes.large() + 2,
            pairing: Pairing::Peft,
        };
        let ternary = ternary.generate(&Device::cpu()).unwrap();
        let b = ternary.b().unwrap();
        let mut numbers = b.to_vec::<f32>().unwrap();
        *numbers.last_mut().unwrap() = 0.5;
        let b = Tensor::from_vec(numbers, b.dims(), &Device::cpu()).unwrap();
        let dense = Bases::new(ternary.a(), &b, Pairing::Peft).unwrap();
        let share = 2.0 / (sizes.small() as f64).sqrt();
        assert!(
            matches!(ternary.form(), Form::Ternary { share: found } if (found / share - 1.0).abs() < 0.1)
        );
        assert_eq!(dense.form(), Form::Dense);
        // Places of 2 bytes, by rows and by columns, and where each row's and column's begin.
        let [places, entries] = [&ternary, &dense].map(|bases| bases.bytes() - 4 * bases.a().numel());
        assert!(4 * places < entries, "{places} of {entries}");
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
            let (x, w) = (normal("x", &[150, inputs], dtype), normal("w", &[outputs, inputs], dtype));
            let lambda = normal("λ", &[rank, sizes.bases()], dtype);
            let gamma = normal("γ", &[sizes.bases(), sizes.small()], dtype);
            for ways in WAYS {
                let of = |bases: &Bases| {
                    let bases = Arc::new(bases.to_dtype(dtype).unwrap());
                    let o = RandLoraOptions { bases, scale: 0.5, dropout: None, ways: Some(ways) };
                    run(&x, &w, &lambda, &gamma, |[x, l, g]| randlora_linear(x, &w, None, l, g, &o).unwrap())
                };
                for (got, want) in of(&ternary).iter().zip(&of(&dense)) {
                    assert!(distance(got, want) < tolerance, "{sizes:?}, {dtype}, {ways:?}");
                }
            }
        }
    }
}

/// What PEFT gets to compute with: the zeros and √n written out, its own pairing.
#[test]
fn block_bases_written_out_are_dense_bases_that_give_the_same() {
    for (inputs, outputs, rank) in [(24, 24, 6), (20, 50, 7), (50, 20, 7), (12, 30, 1), (12, 30, 13)] {
        let sizes = Sizes { tokens: 9, inputs, outputs, rank };
        let (x, w) = (normal("x", &[9, inputs], DType::F64), normal("w", &[outputs, inputs], DType::F64));
        let lambda = normal("λ", &[rank, sizes.bases()], DType::F64);
        let gamma = normal("γ", &[sizes.bases(), sizes.small()], DType::F64);
        let o = options(sizes, (Distribution::Normal, Structure::Block), DType::F64, None);
        let written = Arc::new(o.bases.dense(sizes.bases()).unwrap());
        assert_eq!((written.structure(), written.pairing()), (Structure::Dense, Pairing::Peft));
        assert_eq!(written.b_shape().dims(), [sizes.large(), sizes.bases(), rank]);
        let of = |o: &RandLoraOptions| {
            run(&x, &w, &lambda, &gamma, |[x, l, g]| randlora_linear(x, &w, None, l, g, o).unwrap())
        };
        let (want, got) = (of(&o), of(&RandLoraOptions { bases: written, ..o.clone() }));
        for (got, want) in got.iter().zip(&want) {
            assert!(distance(got, want) < 1e-12, "{sizes:?}");
        }
    }
}

/// More tokens than one chunk holds, so that masks are made from the middle too. The mask comes from
/// the dropout operation on ones.
#[test]
fn dropout_over_many_chunks_equals_the_dense_formula() {
    for (inputs, outputs) in [(5, 9), (9, 5)] {
        let sizes = Sizes { tokens: 9000, inputs, outputs, rank: 2 };
        let (x, w) = (normal("x", &[9000, inputs], DType::F64), normal("w", &[outputs, inputs], DType::F64));
        let lambda = normal("λ", &[2, sizes.bases()], DType::F64);
        let gamma = normal("γ", &[sizes.bases(), 5], DType::F64);
        let key = DropoutKey { seed: 4, step: 5, site: 6 };
        for kind in KINDS {
            let o = options(sizes, kind, DType::F64, None);
            let want = run(&x, &w, &lambda, &gamma, |[x, l, g]| {
                let adapted = x.dropout(0.3, key).unwrap().linear(&dense(sizes, &o, l, g), None).unwrap();
                x.linear(&w, None).unwrap().add(&adapted).unwrap()
            });
            for ways in WAYS {
                let o = RandLoraOptions { dropout: Some((0.3, key)), ways: Some(ways), ..o.clone() };
                let got =
                    run(&x, &w, &lambda, &gamma, |[x, l, g]| randlora_linear(x, &w, None, l, g, &o).unwrap());
                for (got, want) in got.iter().zip(&want) {
                    assert!(distance(got, want) < 1e-12, "{sizes:?}, {kind:?}, {ways:?}");
                }
            }
        }
    }
}

#[test]
fn narrow_frozen_weights_give_what_their_widened_values_give() {
    for (inputs, outputs) in [(24, 40), (40, 24)] {
        let sizes = Sizes { tokens: 10, inputs, outputs, rank: 5 };
        let x = normal("x", &[10, inputs], DType::F32);
        let lambda = normal("λ", &[5, sizes.bases()], DType::F32);
        let gamma = normal("γ", &[sizes.bases(), sizes.small()], DType::F32);
        for narrow in [DType::BF16, DType::F16] {
            let stored = normal("w", &[outputs, inputs], DType::F32).to_dtype(narrow).unwrap();
            let widened = stored.to_dtype(DType::F32).unwrap();
            for (ways, kind) in WAYS.into_iter().flat_map(|ways| KINDS.map(|kind| (ways, kind))) {
                let o = options(sizes, kind, DType::F32, Some(ways));
                let of = |w: &Tensor| {
                    run(&x, &widened, &lambda, &gamma, |[x, l, g]| {
                        randlora_linear(x, w, None, l, g, &o).unwrap()
                    })
                };
                for (a, b) in of(&stored).iter().zip(&of(&widened)) {
                    assert!(distance(a, b) < 1e-6);
                }
            }
        }
    }
}

/// A frozen layer with an adapter of rank 4, in f64.
fn adapted(inputs: usize, outputs: usize, structure: Structure, start: Start) -> Linear {
    let mut layer = Linear::init(&Init::seeded(2, &Device::cpu()), inputs, outputs, true).unwrap();
    layer.cast(DType::F64).unwrap();
    let method = RandLora { rank: 4, scale: 1.0, structure, start, ..RandLora::default() };
    adapters::attach(&mut layer, &method, &Targets::AllLinear, &[]).unwrap();
    layer
}

fn delta_rank(layer: &Linear) -> usize {
    analysis::rank(&layer.delta().unwrap().unwrap()).unwrap()
}

#[test]
fn the_update_starts_at_zero_and_has_full_rank_after_one_step_or_two() {
    let sizes = [(24, 24), (18, 31), (31, 18), (22, 22)];
    let cases = sizes.into_iter().flat_map(|s| STRUCTURES.map(|t| (s, t)));
    // Where λ starts at 0, γ is constant in the first step, and A is what all bases share.
    let starts = [(Start::Peft, Some(4)), (Start::LikeLora, None)];
    let cases = cases.flat_map(|case| starts.map(|start| (case, start)));
    for (((inputs, outputs), structure), (start, first_rank)) in cases {
        let mut layer = adapted(inputs, outputs, structure, start);
        let x = normal("x", &[50, inputs], DType::F64);
        let goal = normal("goal", &[50, outputs], DType::F64);
        let mut optimizer = AdamW::new();
        let mut step = |layer: &mut Linear| {
            let y = layer.forward(&x, &Context::eval().tracked()).unwrap();
            let gradients = y.mse_loss(&goal).unwrap().backward().unwrap();
            optimizer.step(layer, &gradients, 1e-2).unwrap();
        };
        let delta = layer.delta().unwrap().unwrap().to_vec::<f64>().unwrap();
        assert!(delta.iter().all(|&d| d == 0.0));
        step(&mut layer);
        let (full, what) = (inputs.min(outputs), format!("{inputs}→{outputs}, {structure:?}, {start:?}"));
        assert_eq!(delta_rank(&layer), first_rank.unwrap_or(full), "{what}, first step");
        step(&mut layer);
        assert_eq!(delta_rank(&layer), full, "{what}, second step");
    }
}

/// Dense bases give full rank. In sparse ones a whole column of A can be zero, with probability
/// (1 − 2/s)^r, and nothing reaches that column of ΔW: the rank is the number of the others.
#[test]
fn random_diagonals_give_all_the_rank_that_the_bases_have() {
    let sparse = [Distribution::SPARSE, Distribution::very_sparse(30)];
    let without_zeros = [Distribution::Uniform, Distribution::Normal, Distribution::SIGNS];
    let dense = without_zeros.into_iter().chain(sparse).map(|d| (d, Structure::Dense));
    // Blocks of signs are square matrices of few numbers, which may be singular.
    let block = without_zeros[..2].iter().map(|&d| (d, Structure::Block));
    for (distribution, structure) in dense.chain(block) {
        for (inputs, outputs, rank) in [(30, 30, 4), (30, 50, 7), (50, 30, 30), (30, 50, 1)] {
            let sizes = Sizes { tokens: 0, inputs, outputs, rank };
            let o = options(sizes, (distribution, structure), DType::F64, None);
            let lambda = normal("λ", &[rank, sizes.bases()], DType::F64);
            let gamma = normal("γ", &[sizes.bases(), 30], DType::F64);
            let a = o.bases.a().to_vec::<f64>().unwrap();
            let reached = (0..30).filter(|j| (0..rank).any(|k| a[k * 30 + j] != 0.0)).count();
            assert!(reached == 30 || sparse.contains(&distribution));
            let mut identity = vec![0.0; inputs * inputs];
            identity.iter_mut().step_by(inputs + 1).for_each(|one| *one = 1.0);
            let identity = Tensor::from_vec(identity, [inputs, inputs], &Device::cpu()).unwrap();
            let zero = Tensor::zeros([outputs, inputs], DType::F64, &Device::cpu()).unwrap();
            let delta = randlora_linear(&identity, &zero, None, &lambda, &gamma, &o).unwrap();
            let found = analysis::rank(&delta).unwrap();
            assert_eq!(found, reached, "{distribution:?} {structure:?} {sizes:?}");
        }
    }
}

/// paper.md §1.6, recomputed there from the papers' models, with n = ⌈m/r⌉.
#[test]
fn parameter_counts_are_the_papers() {
    let count = |rank, layers: &[(usize, usize)]| -> usize {
        let method = RandLora { rank, ..RandLora::default() };
        layers.iter().map(|&(inputs, outputs)| method.trained(inputs, outputs)).sum()
    };
    let clip = |d: usize| [(d, 3 * d), (d, 4 * d), (4 * d, d)];
    assert_eq!(12 * (count(6, &clip(768)) + count(6, &clip(512))), 5_170_320);
    let roberta = |d: usize| [(d, d), (d, d), (d, d), (d, d), (d, 4 * d), (4 * d, d)];
    assert_eq!(12 * count(64, &roberta(768)), 718_848);
    assert_eq!(24 * count(100, &roberta(1024)), 1_780_416);
    assert_eq!(24 * count(20, &[(1024, 1024), (1024, 1024), (1024, 4096), (4096, 1024)]), 5_211_648);
    let llama = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 14336), (14336, 4096)];
    assert_eq!([60, 30, 15].map(|r| 32 * count(r, &llama)), [28_778_112, 56_626_112, 112_723_968]);
    // And what is attached has as many.
    for structure in STRUCTURES {
        let layer = adapted(18, 31, structure, Start::LikeLora);
        assert_eq!(layer.trainable_count(), RandLora { rank: 4, ..RandLora::default() }.trained(18, 31));
    }
}

#[test]
fn layers_of_all_sizes_share_one_pair_of_bases() {
    let layer = |name: &str, inputs, outputs| LayerInfo {
        name: name.into(),
        inputs,
        outputs,
        dtype: DType::F32,
        device: Device::cpu(),
        weight: Tensor::zeros([outputs, inputs], DType::F32, &Device::cpu()).unwrap(),
    };
    let method = RandLora { rank: 4, ..RandLora::default() };
    let bases = method.bases(&[layer("a", 8, 40), layer("b", 30, 10), layer("c", 12, 12)]).unwrap().unwrap();
    assert_eq!((bases.a().dims(), bases.b_shape().dims()), (&[4, 12][..], &[40, 3, 4][..]));
    let block = RandLora { structure: Structure::Block, ..method };
    let layers = [layer("a", 8, 40), layer("b", 30, 10), layer("c", 12, 12)];
    assert_eq!(block.bases(&layers).unwrap().unwrap().b_shape().dims(), [40, 4]);
    assert_eq!(block.adapters(&layers).unwrap().unwrap().len(), 3);
    // PEFT cannot tell two numbers of bases apart; with one it can.
    let for_peft = RandLora { pairing: Pairing::Peft, ..block };
    let error = for_peft.adapters(&layers).unwrap_err().to_string();
    assert!(error.contains("`a` has 2 bases and `b` has 3"), "{error}");
    assert_eq!(for_peft.adapters(&layers[1..]).unwrap().unwrap().len(), 2);
    assert_eq!(method.adapters(&[]).unwrap().unwrap().len(), 0);
}

#[test]
fn merging_gives_the_same_outputs() {
    for structure in STRUCTURES {
        let mut layer = adapted(12, 20, structure, Start::LikeLora);
        for (name, parameter) in layer.adapter_mut().unwrap().parameters_mut() {
            parameter.set(normal(name, parameter.value().dims(), DType::F64)).unwrap();
        }
        let x = normal("x", &[5, 12], DType::F64);
        let before = layer.forward(&x, &Context::eval()).unwrap();
        layer.merge(None).unwrap();
        assert!(distance(&layer.forward(&x, &Context::eval()).unwrap(), &before) < 1e-12);
    }
}

#[test]
fn a_gradient_for_the_frozen_weight_is_an_error_that_says_why() {
    let sizes = Sizes { tokens: 2, inputs: 6, outputs: 6, rank: 2 };
    let [x, w] = ["x", "w"].map(|n| normal(n, &[if n == "x" { 2 } else { 6 }, 6], DType::F32));
    let (lambda, gamma) = (normal("λ", &[2, 3], DType::F32), normal("γ", &[3, 6], DType::F32));
    let o = options(sizes, (Distribution::Uniform, Structure::Dense), DType::F32, None);
    let error = randlora_linear(&x, &w.track(), None, &lambda, &gamma, &o).unwrap_err();
    assert!(matches!(error, Error::Frozen { .. }));
    assert!(error.to_string().contains("freeze the weight"), "{error}");

    let wrong = |x: &Tensor, w: &Tensor, l: &Tensor, g: &Tensor| {
        randlora_linear(x, w, None, l, g, &o).unwrap_err().to_string()
    };
    let message = wrong(&x, &w, &gamma, &lambda);
    assert!(message.contains("wants [2, 3] and [3, 6]"), "{message}");
    let message = wrong(&normal("x", &[2, 5], DType::F32), &w, &lambda, &gamma);
    assert!(message.contains("6 inputs"), "{message}");
    let message = wrong(&x.to_dtype(DType::F64).unwrap(), &w, &lambda, &gamma);
    assert!(message.contains("f64"), "{message}");
    let large = normal("w", &[7, 7], DType::F32);
    let message = wrong(
        &normal("x", &[2, 7], DType::F32),
        &large,
        &normal("λ", &[2, 4], DType::F32),
        &normal("γ", &[4, 7], DType::F32),
    );
    assert!(message.contains("larger than the bases"), "{message}");
}

#[test]
fn settings_and_targets_that_make_no_sense() {
    let init = Init::seeded(2, &Device::cpu());
    let mut model = vec![Linear::init(&init, 4, 4, true).unwrap(), Linear::init(&init, 4, 4, true).unwrap()];
    let names = Targets::names;
    let method = RandLora { rank: 2, ..RandLora::default() };
    let error = adapters::attach(&mut model, &method, &names(&["2"]), &[]).unwrap_err();
    assert_eq!(error.to_string(), "`2` matches no layer; there are: 0, 1");
    assert!(adapters::attach(&mut model, &method, &names(&[]), &[]).is_err());
    assert!(adapters::attach(&mut model, &method, &names(&["0"]), &["head"]).is_err());
    assert!(adapters::attach(&mut model, &RandLora { rank: 0, ..method }, &names(&["0"]), &[]).is_err());
    let error = adapters::by_name("qlora", &adapters::Settings::default()).unwrap_err();
    assert!(error.to_string().contains("randlora, lora, rslora"), "{error}");
    // Nothing was changed by what failed.
    assert_eq!(model.trainable_count(), model.parameter_count());

    let attached = adapters::attach(&mut model, &method, &names(&["0"]), &["1"]).unwrap();
    assert_eq!(attached.layers, ["0"]);
    assert_eq!(attached.trained, method.trained(4, 4) + 4 * 4 + 4);
    assert!(adapters::attach(&mut model, &method, &names(&["0"]), &[]).is_err());
}
