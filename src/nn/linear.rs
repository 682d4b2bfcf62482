//! Linear layers, and the hook by which adapters change them.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::Gradients;
use crate::linalg::norm;
use crate::nn::{Context, Init, Item, ItemMut, Module, Parameter, join};
use crate::tensor::Tensor;

/// Settings by their names, as texts.
pub type Recipe = BTreeMap<&'static str, String>;

/// What changes a frozen linear layer: by an update of its output, y = x·Wᵀ + b + u(x). An adapter is `Clone`:
/// a copy's parameters are its own.
pub trait LinearAdapter: Any + Debug + Send + Sync + CloneAdapter {
    /// The name of the method, as in `randlora`; its parameters' names begin with it.
    fn method(&self) -> &'static str;

    /// u(x): what the adapter adds to the frozen layer's output, x (…, in) to (…, out), for the layer's weight
    /// (out, in). It is x·ΔWᵀ where the change is one of the weight; several adapters' are summed.
    fn update(&self, x: &Tensor, weight: &Tensor, ctx: &Context) -> Result<Tensor>;

    /// The layer's output: x (…, in) to (…, out), for the layer's weight (out, in) and bias (out). An adapter
    /// that can fuse its update with the frozen product does so here.
    fn forward(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, ctx: &Context) -> Result<Tensor> {
        self.beside(x, weight, bias, ctx)
    }

    /// The same, always as the sum of the frozen layer's output and the update.
    fn beside(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, ctx: &Context) -> Result<Tensor> {
        x.linear(weight, bias)?.add(&self.update(x, weight, ctx)?)
    }

    /// The adapter's own parameters with their names, always in the same order.
    fn parameters(&self) -> Vec<(&'static str, &Parameter)>;

    /// The same parameters, to be changed.
    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)>;

    /// Visits the parameters by their names in a model: that of the layer, of the method and the adapter's own.
    fn visit<'a>(&'a self, layer: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        let path = join(layer, self.method());
        self.parameters().into_iter().for_each(|(name, p)| p.visit(&join(&path, name), f));
    }

    /// The same visit, to change them.
    fn visit_mut(&mut self, layer: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        let path = join(layer, self.method());
        self.parameters_mut().into_iter().for_each(|(name, p)| p.visit_mut(&join(&path, name), f));
    }

    /// The change of this weight of the layer as a dense matrix (out, in), in the adapter's type: for
    /// merging and analysis, never in training.
    ///
    /// # Errors
    /// [`Error::Config`] where there is no such matrix, because the change depends on the input.
    fn delta(&self, weight: &Tensor) -> Result<Tensor>;

    /// The settings that it was made with, by their names as texts, so that a file can keep them: with
    /// them, its parameters and what it was [given](LinearAdapter::given) it can be made again on the same
    /// layer. None where it cannot.
    fn recipe(&self) -> Option<Recipe> {
        None
    }

    /// Matrices (out, in) that are not trained and follow from neither the settings nor the layer: a file
    /// has to keep them as they are.
    fn given(&self) -> &[Tensor] {
        &[]
    }

    /// What the adapter adds to the loss, a single number.
    fn regulariser(&self, _ctx: &Context) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Called when the optimiser has made step `step` (0 is the first) with these gradients.
    fn after_step(&mut self, _step: usize, _gradients: &Gradients) -> Result<()> {
        Ok(())
    }

    /// Called when [`after_step`](LinearAdapter::after_step) has been for every adapter of the model:
    /// for what adapters decide together.
    fn settle(&mut self, _step: usize) -> Result<()> {
        Ok(())
    }
}

/// The copy of an adapter whose type is not known any more; every adapter that is `Clone` has it.
pub trait CloneAdapter {
    /// The copy.
    fn boxed_clone(&self) -> Box<dyn LinearAdapter>;
}

impl<A: LinearAdapter + Clone> CloneAdapter for A {
    fn boxed_clone(&self) -> Box<dyn LinearAdapter> {
        Box::new(self.clone())
    }
}

impl Clone for Box<dyn LinearAdapter> {
    fn clone(&self) -> Box<dyn LinearAdapter> {
        (**self).boxed_clone()
    }
}

/// y = x·Wᵀ + b: x (…, in), W (out, in), b (out), y (…, out); or what an adapter makes of it.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Parameter,
    bias: Option<Parameter>,
    adapter: Option<Box<dyn LinearAdapter>>,
}

impl Linear {
    /// A layer with this weight (out, in) and bias (out).
    ///
    /// # Errors
    /// [`Error::Shape`] where they do not fit together.
    pub fn new(weight: Parameter, bias: Option<Parameter>) -> Result<Linear> {
        let fits = match (weight.value().dims(), &bias) {
            (&[out, _], Some(bias)) => bias.value().dims() == [out],
            (&[_, _], None) => true,
            _ => false,
        };
        if !fits {
            let bias = bias.map_or(String::new(), |b| format!(", the bias {}", b.value().shape()));
            let message =
                format!("the weight is {}{bias}: (out, in) and (out) are needed", weight.value().shape());
            return Err(Error::shape("linear", message));
        }
        Ok(Linear { weight, bias, adapter: None })
    }

    /// A layer with a normal weight of variance 1/inputs, which keeps the size of what goes through
    /// it, or of the one that [`Init::with_linear_std`] asks for, and a bias of 0.
    pub fn init(init: &Init, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        let std = init.linear_std(inputs);
        let weight = Parameter::new(init.normal("weight", [outputs, inputs], std)?);
        let bias = bias.then(|| init.constant([outputs], 0.0)).transpose()?;
        Linear::new(weight, bias.map(Parameter::new))
    }

    /// The layer's output.
    pub fn forward(&self, x: &Tensor, ctx: &Context) -> Result<Tensor> {
        let (weight, bias) = (self.weight.tensor(ctx), self.bias.as_ref().map(|b| b.tensor(ctx)));
        match &self.adapter {
            Some(adapter) => adapter.forward(x, &weight, bias.as_ref(), ctx),
            None => x.linear(&weight, bias.as_ref()),
        }
    }

    /// The size of an input row.
    pub fn inputs(&self) -> usize {
        self.weight.value().dims()[1]
    }

    /// The size of an output row.
    pub fn outputs(&self) -> usize {
        self.weight.value().dims()[0]
    }

    /// The weight (out, in), without what an adapter adds.
    pub fn weight(&self) -> &Parameter {
        &self.weight
    }

    /// The bias (out).
    pub fn bias(&self) -> Option<&Parameter> {
        self.bias.as_ref()
    }

    /// The adapter.
    pub fn adapter(&self) -> Option<&dyn LinearAdapter> {
        self.adapter.as_deref()
    }

    /// The adapter, to be changed.
    pub fn adapter_mut(&mut self) -> Option<&mut (dyn LinearAdapter + 'static)> {
        self.adapter.as_deref_mut()
    }

    /// Puts an adapter on the layer. It does not freeze the layer's own parameters: who attaches
    /// adapters to a model freezes the model first.
    ///
    /// # Errors
    /// [`Error::Config`] where the layer has an adapter.
    pub fn attach(&mut self, adapter: Box<dyn LinearAdapter>) -> Result<()> {
        if let Some(old) = &self.adapter {
            let message = format!("the layer has one ({}): merge or detach it first", old.method());
            return Err(Error::config("adapter", message));
        }
        self.adapter = Some(adapter);
        Ok(())
    }

    /// Takes the adapter off: the layer is what it was before.
    pub fn detach(&mut self) -> Option<Box<dyn LinearAdapter>> {
        self.adapter.take()
    }

    /// The change of the weight that the adapter makes, as a dense matrix (out, in); None without one.
    ///
    /// # Errors
    /// Those of [`LinearAdapter::delta`].
    pub fn delta(&self) -> Result<Option<Tensor>> {
        self.adapter().map(|adapter| adapter.delta(self.weight.value())).transpose()
    }

    /// Adds the adapter's change to the weight and takes the adapter off: the layer gives the same
    /// output (up to rounding) and the adapter costs nothing any more. The weight keeps its type, or takes this
    /// one; it is rounded once.
    ///
    /// # Errors
    /// [`Error::Data`] where the change or the sum is not finite, and those of [`LinearAdapter::delta`]; the
    /// layer is unchanged then.
    pub fn merge(&mut self, dtype: Option<DType>) -> Result<Option<Merged>> {
        let Some(adapter) = &self.adapter else { return Ok(None) };
        let weight = self.weight.value();
        let dtype = dtype.unwrap_or(weight.dtype());
        let wide = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let delta = adapter.delta(weight)?.detach().to_dtype(wide)?;
        let sum = weight.to_dtype(wide)?.add(&delta)?;
        let rounded = sum.to_dtype(dtype)?;
        let lost = norm(&rounded.to_dtype(wide)?.sub(&sum)?)?;
        let size = norm(&delta)?;
        if !size.is_finite() {
            return Err(Error::data("the adapter's change", "not finite: the adapter is broken"));
        }
        if !lost.is_finite() {
            return Err(Error::data("the merged weight", format!("too large for {dtype}: use f32")));
        }
        let old = self.weight.value().clone();
        self.weight.replace(rounded)?;
        Ok(self.adapter.take().map(|adapter| Merged { weight: old, adapter, size, lost }))
    }

    /// Undoes a merge: the layer has its old weight again, bit for bit, and the adapter.
    ///
    /// # Errors
    /// [`Error::Config`] where the layer has another adapter by now, [`Error::Shape`] for another layer's merge.
    pub fn unmerge(&mut self, merged: Merged) -> Result<()> {
        if let Some(other) = &self.adapter {
            let message = format!("the layer has one ({}): detach it first", other.method());
            return Err(Error::config("adapter", message));
        }
        self.weight.replace(merged.weight)?;
        self.adapter = Some(merged.adapter);
        Ok(())
    }
}

/// What [`Linear::merge`] took off a layer.
#[derive(Debug)]
pub struct Merged {
    weight: Tensor,
    adapter: Box<dyn LinearAdapter>,
    size: f64,
    lost: f64,
}

impl Merged {
    /// The adapter.
    pub fn adapter(&self) -> &dyn LinearAdapter {
        &*self.adapter
    }

    /// ‖ΔW‖, the Frobenius norm of the change.
    pub fn size(&self) -> f64 {
        self.size
    }

    /// What rounding the sum to the weight's type lost of the change: ‖round(W + ΔW) − (W + ΔW)‖. Over
    /// [`size`](Merged::size), its share.
    pub fn lost(&self) -> f64 {
        self.lost
    }
}

impl Module for Linear {
    fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        f(path, Item::Linear(self));
        self.weight.visit(&join(path, "weight"), f);
        self.bias.visit(&join(path, "bias"), f);
        self.adapter.iter().for_each(|adapter| adapter.visit(path, f));
    }

    fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        f(path, ItemMut::Linear(self));
        self.weight.visit_mut(&join(path, "weight"), f);
        self.bias.visit_mut(&join(path, "bias"), f);
        self.adapter.iter_mut().for_each(|adapter| adapter.visit_mut(path, f));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    /// ΔW = s everywhere.
    #[derive(Clone, Debug)]
    struct Shift {
        s: Parameter,
        shape: [usize; 2],
        steps: usize,
    }

    impl LinearAdapter for Shift {
        fn method(&self) -> &'static str {
            "shift"
        }

        fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
            x.linear(&self.s.tensor(ctx).broadcast_to(self.shape)?, None)
        }

        fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
            vec![("s", &self.s)]
        }

        fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
            vec![("s", &mut self.s)]
        }

        fn delta(&self, _: &Tensor) -> Result<Tensor> {
            self.s.value().broadcast_to(self.shape)
        }

        fn regulariser(&self, ctx: &Context) -> Result<Option<Tensor>> {
            self.s.tensor(ctx).powf(2.0).map(Some)
        }

        fn after_step(&mut self, step: usize, _: &Gradients) -> Result<()> {
            self.steps += step + 1;
            Ok(())
        }

        fn settle(&mut self, step: usize) -> Result<()> {
            self.steps += 100 * step;
            Ok(())
        }
    }

    fn layer(dtype: DType) -> (Linear, Tensor) {
        let init = Init::seeded(5, &Device::cpu());
        let mut layer = Linear::init(&init, 3, 2, true).unwrap();
        layer.freeze();
        layer.cast(dtype).unwrap();
        (layer, init.normal("x", [4, 3], 1.0).unwrap())
    }

    fn shift(s: f64) -> Box<dyn LinearAdapter> {
        let s = Tensor::scalar(s, DType::F32, &Device::cpu()).unwrap();
        Box::new(Shift { s: Parameter::new(s), shape: [2, 3], steps: 0 })
    }

    #[test]
    fn an_adapter_comes_and_goes() {
        let (mut layer, x) = layer(DType::F32);
        let run = |layer: &Linear| layer.forward(&x, &Context::eval()).unwrap().to_vec::<f32>().unwrap();
        let plain = run(&layer);
        layer.attach(shift(0.5)).unwrap();
        let names: Vec<_> = layer.parameters().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["weight", "bias", "shift.s"]);
        assert_eq!(layer.trainable_count(), 1);
        assert!(matches!(layer.attach(shift(0.1)), Err(Error::Config { .. })));
        let adapted = run(&layer);
        assert_ne!(adapted, plain);

        let adapter = layer.detach().unwrap();
        assert_eq!(run(&layer), plain);
        layer.attach(adapter).unwrap();
        let merged = layer.merge(None).unwrap().unwrap();
        assert_eq!(merged.adapter().method(), "shift");
        assert!(layer.adapter().is_none() && merged.lost() == 0.0);
        for (merged, adapted) in run(&layer).iter().zip(&adapted) {
            assert!((merged - adapted).abs() < 1e-6);
        }
        assert!(layer.merge(None).unwrap().is_none());

        layer.unmerge(merged).unwrap();
        assert_eq!(run(&layer), adapted);
        layer.detach().unwrap();
        assert_eq!(run(&layer), plain);
    }

    #[test]
    fn unmerging_is_no_subtraction() {
        let (mut layer, _) = layer(DType::BF16);
        let weight =
            |layer: &Linear| layer.weight().value().to_dtype(DType::F32).unwrap().to_vec::<f32>().unwrap();
        let before = weight(&layer);
        // In bf16 nothing is left of the weight beside this.
        layer.attach(shift(1e4)).unwrap();
        let merged = layer.merge(None).unwrap().unwrap();
        assert!(merged.lost() > 0.0 && weight(&layer).iter().all(|&w| w == weight(&layer)[0]));
        layer.unmerge(merged).unwrap();
        assert_eq!(weight(&layer), before);

        let merged = layer.merge(None).unwrap().unwrap();
        layer.attach(shift(1.0)).unwrap();
        assert!(matches!(layer.unmerge(merged), Err(Error::Config { .. })));
    }

    #[test]
    fn what_is_not_finite_is_not_merged() {
        for (s, dtype, part) in
            [(f64::NAN, None, "broken"), (1e5, Some(DType::F16), "too large for f16: use f32")]
        {
            let (mut layer, _) = layer(DType::F32);
            let before = layer.weight().value().to_vec::<f32>().unwrap();
            layer.attach(shift(s)).unwrap();
            let error = layer.merge(dtype).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
            assert!(layer.adapter().is_some());
            assert_eq!(layer.weight().value().to_vec::<f32>().unwrap(), before);
        }
    }

    #[test]
    fn merging_rounds_a_narrow_weight_once() {
        let (mut layer, _) = layer(DType::BF16);
        let before = layer.weight().value().to_dtype(DType::F64).unwrap();
        layer.attach(shift(0.3)).unwrap();
        let merged = layer.merge(None).unwrap().unwrap();
        // 6 numbers of 0.3 each, and at most half a unit in the last place of the sum.
        assert!((merged.size() - 0.3 * 6f64.sqrt()).abs() < 1e-6, "{merged:?}");
        assert!(merged.lost() > 0.0 && merged.lost() < 0.05, "{merged:?}");
        let want = before.add_scalar(0.3f32 as f64).unwrap().to_dtype(DType::BF16).unwrap();
        let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(layer.weight().value().dtype(), DType::BF16);
        for (got, want) in wide(layer.weight().value()).iter().zip(wide(&want)) {
            assert!((got - want).abs() <= want.abs() / 256.0);
        }
    }

    #[test]
    fn regulariser_and_after_step_reach_every_adapter() {
        let mut layers = vec![layer(DType::F32).0, layer(DType::F32).0, layer(DType::F32).0];
        assert!(layers.regulariser(&Context::eval()).unwrap().is_none());
        layers[0].attach(shift(2.0)).unwrap();
        layers[2].attach(shift(3.0)).unwrap();
        assert_eq!(layers.regulariser(&Context::eval()).unwrap().unwrap().item().unwrap(), 13.0);
        layers.after_step(6, &Gradients::default()).unwrap();
        assert!(
            layers
                .linears()
                .iter()
                .filter_map(|(_, l)| l.adapter())
                .all(|a| format!("{a:?}").contains("steps: 607"))
        );
    }

    #[test]
    fn shapes_are_checked_when_made() {
        let tensor =
            |dims: &[usize]| Parameter::new(Tensor::zeros(dims, DType::F32, &Device::cpu()).unwrap());
        assert!(Linear::new(tensor(&[2, 3]), Some(tensor(&[2]))).is_ok());
        for (weight, bias) in [(&[2, 3][..], &[3][..]), (&[2], &[2]), (&[2, 3], &[2, 1])] {
            assert!(matches!(Linear::new(tensor(weight), Some(tensor(bias))), Err(Error::Shape { .. })));
        }
        assert!(Linear::init(&Init::seeded(0, &Device::cpu()), 0, 0, true).is_ok());
    }
}
