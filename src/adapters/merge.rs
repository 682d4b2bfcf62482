//! Merging all adapters of a model into its weights, and back.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{ItemMut, Merged, Module};

/// Merges a model's adapters into its weights, which keep their types or take this one: it gives the same outputs,
/// up to rounding, at no more cost than before it was adapted. Returns what [`unmerge`] needs, by the layers' names.
///
/// Changes nothing where it fails.
///
/// ```
/// use randlora::adapters::{Lora, Targets, attach, merge, unmerge};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 4, 3, true)?;
/// attach(&mut layer, &Lora::default(), &Targets::AllLinear, &[])?;
/// let merged = merge(&mut layer, None)?;
/// assert!(layer.adapter().is_none());
/// unmerge(&mut layer, merged)?;
/// assert!(layer.adapter().is_some());
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// # Errors
/// [`Error::Data`] that names the layer whose sum is not finite.
pub fn merge<M: Module + ?Sized>(model: &mut M, dtype: Option<DType>) -> Result<Vec<(String, Merged)>> {
    let mut done = Vec::new();
    let result = model.try_visit_mut(&mut |name, item| {
        let ItemMut::Linear(layer) = item else { return Ok(()) };
        let merged =
            layer.merge(dtype).map_err(|error| Error::data(format!("`{name}`"), error.to_string()))?;
        done.extend(merged.map(|merged| (name.to_string(), merged)));
        Ok(())
    });
    match result {
        Ok(()) => Ok(done),
        Err(error) => {
            unmerge(model, done)?;
            Err(error)
        }
    }
}

/// Undoes [`merge`]: the model has its old weights again, bit for bit, and its adapters.
///
/// # Errors
/// [`Error::Config`] where a layer has another adapter by now, [`Error::Shape`] for another model's layers.
pub fn unmerge<M: Module + ?Sized>(model: &mut M, merged: Vec<(String, Merged)>) -> Result<()> {
    let mut merged = merged.into_iter().peekable();
    model.try_visit_mut(&mut |name, item| match item {
        ItemMut::Linear(layer) => match merged.next_if(|(of, _)| of == name) {
            Some((_, merged)) => layer.unmerge(merged),
            None => Ok(()),
        },
        ItemMut::Parameter(_) => Ok(()),
    })?;
    match merged.next() {
        Some((name, _)) => {
            let available = model.linears().into_iter().map(|(name, _)| name).collect();
            Err(Error::NoMatch { wanted: format!("the merged `{name}`"), available })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::{Lora, Targets, attach};
    use crate::device::Device;
    use crate::nn::{Context, Init, Linear};
    use crate::tensor::Tensor;

    struct Pair {
        first: Linear,
        second: Linear,
    }
    crate::module!(Pair { first, second });

    /// Two layers with adapters that change them, the second's by `size`.
    fn pair(dtype: DType, size: f64) -> Pair {
        let init = Init::seeded(3, &Device::cpu());
        let linear = |name| Linear::init(&init.at(name), 5, 5, true).unwrap();
        let mut model = Pair { first: linear("first"), second: linear("second") };
        model.freeze();
        // As checkpoints are loaded: matrices alone stay in a narrow type.
        model
            .try_visit_mut(&mut |name, item| match item {
                ItemMut::Parameter(p) if name.ends_with("weight") => p.cast(dtype),
                _ => Ok(()),
            })
            .unwrap();
        attach(&mut model, &Lora { rank: 2, ..Lora::default() }, &Targets::AllLinear, &[]).unwrap();
        model
            .try_visit_mut(&mut |name, item| match item {
                ItemMut::Parameter(p) if name.ends_with("lora.b") => {
                    let value = init.normal(name, *p.value().shape(), 0.3)?;
                    p.set(if name.starts_with("second") { value.scale(size)? } else { value })
                }
                _ => Ok(()),
            })
            .unwrap();
        model
    }

    fn run(model: &Pair) -> Vec<f32> {
        let x = Init::seeded(4, &Device::cpu()).normal("x", [3, 5], 1.0).unwrap();
        let h = model.first.forward(&x, &Context::eval()).unwrap();
        model.second.forward(&h, &Context::eval()).unwrap().to_vec().unwrap()
    }

    fn weights(model: &Pair) -> Vec<Vec<f32>> {
        let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_vec().unwrap();
        [&model.first, &model.second].map(|layer| wide(layer.weight().value())).to_vec()
    }

    #[test]
    fn there_and_back() {
        for (dtype, target) in [
            (DType::F32, None),
            (DType::BF16, None),
            (DType::F16, Some(DType::F32)),
            (DType::F32, Some(DType::BF16)),
        ] {
            let mut model = pair(dtype, 1.0);
            let (outputs, before) = (run(&model), weights(&model));
            let merged = merge(&mut model, target).unwrap();
            assert_eq!(merged.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["first", "second"]);
            let kept = target.unwrap_or(dtype);
            assert_eq!(model.first.weight().value().dtype(), kept);
            let exact = kept == DType::F32;
            assert!(merged.iter().all(|(_, m)| (m.lost() == 0.0) == exact && m.size() > 0.1));
            let tolerance = if exact { 1e-5 } else { 0.1 };
            for (merged, adapted) in run(&model).iter().zip(&outputs) {
                assert!((merged - adapted).abs() < tolerance, "{merged} {adapted}");
            }
            unmerge(&mut model, merged).unwrap();
            assert_eq!((run(&model), weights(&model)), (outputs, before));
            assert_eq!(model.first.weight().value().dtype(), dtype);
        }
    }

    #[test]
    fn nothing_is_merged_where_one_layer_cannot_be() {
        let mut model = pair(DType::F32, f64::INFINITY);
        let before = weights(&model);
        let error = merge(&mut model, None).unwrap_err().to_string();
        assert!(error.starts_with("`second`: ") && error.contains("not finite"), "{error}");
        assert_eq!(weights(&model), before);
        assert!(model.first.adapter().is_some() && model.second.adapter().is_some());
    }

    #[test]
    fn what_was_merged_goes_back_where_it_was() {
        let mut model = pair(DType::F32, 1.0);
        let merged = merge(&mut model, None).unwrap();
        let mut other = Linear::init(&Init::seeded(0, &Device::cpu()), 5, 5, true).unwrap();
        assert!(matches!(unmerge(&mut other, merged), Err(Error::NoMatch { .. })));
    }
}
