//! What the graph promises: no recursion, no leak, no second backward, no gradient cut in silence.

use randlora::{DType, Device, Error, Leaf, Op, Result, Saves, Tensor, apply};

fn scalar(value: f64) -> Tensor {
    Tensor::scalar(value, DType::F64, &Device::cpu()).unwrap()
}

#[test]
fn a_million_ops_neither_overflow_the_stack_nor_leak() {
    // A small stack: recursion would need hundreds of megabytes.
    let work = || {
        let device = Device::cpu();
        let x = Tensor::from_vec(vec![0.5f64; 4], [4], &device).unwrap().track();
        let live = device.memory().live_bytes;
        let chain = |n| (0..n).try_fold(x.clone(), |y, _| y.add_scalar(1e-6)).unwrap();
        let gradients = chain(1_000_000).sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.of(&x).unwrap().to_vec::<f64>().unwrap(), [1.0; 4]);
        drop(gradients);
        assert_eq!(device.memory().live_bytes, live);
        // And dropped without a backward.
        drop(chain(1_000_000));
        assert_eq!(device.memory().live_bytes, live);
        // A graph that doubles back: 2⁶⁰ paths, 60 nodes.
        let y = (0..60).try_fold(x.clone(), |y, _| y.add(&y)).unwrap();
        let gradients = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.of(&x).unwrap().to_vec::<f64>().unwrap(), [2f64.powi(60); 4]);
    };
    std::thread::Builder::new().stack_size(512 * 1024).spawn(work).unwrap().join().unwrap();
}

#[test]
fn saved_values_are_freed_as_they_are_used_and_a_second_backward_is_refused() {
    let device = Device::cpu();
    let x = Tensor::ones([1000], DType::F64, &device).unwrap().track();
    let live = device.memory().live_bytes;
    let loss = x.exp().unwrap().sqrt().unwrap().sum_all().unwrap();
    assert!(device.memory().live_bytes >= live + 16_000, "exp and sqrt keep their results");
    let gradients = loss.backward().unwrap();
    drop(gradients);
    assert!(device.memory().live_bytes < live + 100, "only the loss is left, though its graph still stands");
    let error = loss.backward().unwrap_err();
    assert!(matches!(error, Error::GraphUsed { op: "sum" }), "{error}");
    assert!(error.to_string().contains("run the forward again"));
    // A part that is shared is used up too, and the error names the operation.
    let shared = x.exp().unwrap();
    shared.sum_all().unwrap().backward().unwrap();
    assert!(matches!(
        shared.sqrt().unwrap().sum_all().unwrap().backward(),
        Err(Error::GraphUsed { op: "exp" })
    ));
}

#[test]
fn nothing_is_computed_or_kept_for_what_is_frozen() {
    let device = Device::cpu();
    let weight = Tensor::ones([64, 64], DType::F32, &device).unwrap();
    let x = Tensor::ones([128, 64], DType::F32, &device).unwrap();
    let made = device.nodes_made();
    x.linear(&weight, None).unwrap();
    assert_eq!(device.nodes_made(), made, "no input is tracked: no node");
    let live = device.memory().live_bytes;
    let tracked = x.scale(1.0).unwrap().track();
    let y = tracked.linear(&weight, None).unwrap();
    drop((x, tracked));
    // The layer's input is not kept: its frozen weight needs no gradient.
    assert_eq!(device.memory().live_bytes, live - 128 * 64 * 4 + 128 * 64 * 4);
    drop(y);
}

#[test]
fn gradients_of_leaves_in_the_middle_and_of_parameters_by_identity() {
    let weight = scalar(3.0);
    let leaf = Leaf::new();
    // One leaf used twice, as a tied weight is.
    let loss = leaf.track(&weight).mul(&leaf.track(&weight)).unwrap();
    let gradients = loss.backward().unwrap();
    assert_eq!(gradients.get(&leaf).unwrap().item().unwrap(), 6.0);
    assert_eq!(gradients.len(), 1);
    assert!(gradients.get(&Leaf::new()).is_none());
    let unused = scalar(1.0).track();
    assert!(gradients.of(&unused).is_err());
    // Gradients of two halves of a batch add up.
    let mut sum = leaf.track(&weight).scale(2.0).unwrap().backward().unwrap();
    sum.accumulate(leaf.track(&weight).scale(5.0).unwrap().backward().unwrap()).unwrap();
    assert_eq!(sum.get(&leaf).unwrap().item().unwrap(), 7.0);
}

#[test]
fn backward_from_what_leads_nowhere_or_is_no_number() {
    let error = scalar(1.0).backward().unwrap_err();
    assert!(matches!(error, Error::NotTracked { .. }));
    assert!(error.to_string().contains("track()"));
    let x = Tensor::ones([2], DType::F64, &Device::cpu()).unwrap().track();
    assert!(x.scale(2.0).unwrap().backward().unwrap_err().to_string().contains("backward_from"));
    assert!(matches!(x.detach().sum_all().unwrap().backward(), Err(Error::NotTracked { .. })));
    assert!(x.scale(2.0).unwrap().backward_from(&scalar(1.0)).is_err());
}

/// Each kind of broken operation.
#[derive(Debug, Clone, Copy)]
enum Broken {
    NoGradient,
    WrongShape,
    WrongType,
    ReadsWhatItDidNotSave,
}

impl Op for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }
    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        Ok((x[0].scale(2.0)?, vec![]))
    }
    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![match self {
            Broken::NoGradient => None,
            Broken::WrongShape => Some(Tensor::ones([7], DType::F64, dy.device())?),
            Broken::WrongType => Some(dy.to_dtype(DType::F32)?),
            Broken::ReadsWhatItDidNotSave => Some(dy.mul(x[0])?),
        }])
    }
    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }
}

#[test]
fn a_broken_vjp_is_an_error_that_names_the_op() {
    let error = |broken: Broken| {
        let x = Tensor::ones([3], DType::F64, &Device::cpu()).unwrap().track();
        apply(broken, &[&x]).unwrap().sum_all().unwrap().backward().unwrap_err()
    };
    for broken in [Broken::NoGradient, Broken::WrongShape, Broken::WrongType] {
        let error = error(broken);
        assert!(matches!(error, Error::Vjp { op: "broken", input: 0, .. }), "{error}");
    }
    assert!(matches!(error(Broken::ReadsWhatItDidNotSave), Error::NotSaved { .. }));
}

#[test]
fn tensors_and_graphs_cross_threads() {
    let x = Tensor::ones([10], DType::F64, &Device::cpu()).unwrap().track();
    let y = x.exp().unwrap();
    let gradients = std::thread::spawn(move || y.sum_all().unwrap().backward().unwrap()).join().unwrap();
    assert_eq!(gradients.of(&x).unwrap().to_vec::<f64>().unwrap(), [1f64.exp(); 10]);
}
