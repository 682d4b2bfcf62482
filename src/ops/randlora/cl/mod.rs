//! The operation on an OpenCL device: the ways that the plan chooses, with the same pieces as on the CPU. Nothing
//! of W's size is made, and no dense gradient of it.

mod bases;
mod factored;
mod layer;
mod panel;

use super::bases::Structure;
use super::plan::Way;
use super::{RandLora, frozen};
use crate::compute;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::dropout::cl_masked;
use crate::ops::linear::{cl_affine, cl_product, cl_rows_of};
use crate::shape::Shape;
use crate::tensor::Tensor;
pub(super) use bases::ClBases;
use factored::Large;
use layer::ClLayer;

impl RandLora {
    fn cl_layer(&self, x: &[&Tensor]) -> Result<ClLayer<'_>> {
        ClLayer::new(self.sizes, &self.plan, &self.bases, self.scale, [x[1], x[2], x[3]])
    }

    /// The rows that the adapter gets: those of x, under the mask of its dropout.
    fn cl_adapter_input(&self, x: &Tensor) -> Result<Tensor> {
        let rows = compute::rows(x)?;
        match self.dropout {
            Some((p, key)) => cl_masked(&compute::contiguous(&rows)?, key, p),
            None => Ok(rows),
        }
    }

    pub(super) fn cl_forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (rows, bias, sizes) = (compute::rows(x[0])?, x.get(4).copied(), self.sizes);
        // One product for both where the panel holds W0 + ΔW and both see the same x: the sum then begins at
        // the bias.
        let fused = self.plan.forward == Way::Panel && self.dropout.is_none();
        let y = match (fused, bias) {
            (false, bias) => cl_affine(&rows, x[1], bias)?,
            (true, None) => Tensor::zeros([sizes.tokens, sizes.outputs], DType::F32, rows.device())?,
            (true, Some(bias)) => cl_rows_of(bias, sizes.tokens)?,
        };
        let (layer, input) = (self.cl_layer(x)?, self.cl_adapter_input(x[0])?);
        let mut kept = vec![];
        match (self.plan.forward, self.is_wide()) {
            (Way::Panel, false) => layer.panel_up(fused, &input, &y)?,
            (Way::Panel, true) => layer.panel_down(fused, &input, &y)?,
            (Way::Factored, false) => layer.factored_up(&input, &y)?,
            (Way::Factored, true) => {
                if self.plan.keep_h {
                    kept.push(Tensor::zeros([sizes.tokens, sizes.columns()], DType::F32, rows.device())?);
                }
                layer.factored_down(&input, &y, kept.first())?;
            }
        }
        let shape = x[0].shape().with_dim(x[0].rank() - 1, sizes.outputs)?;
        Ok((compute::reshape(&y, shape)?, kept))
    }

    pub(super) fn cl_vjp(
        &self,
        x: &[&Tensor],
        aux: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        if need[1] {
            return Err(frozen());
        }
        let (layer, dy_rows) = (self.cl_layer(x)?, compute::rows(dy)?);
        let (wide, diagonals) = (self.is_wide(), need[2] || need[3]);
        let mut dx = need[0].then(|| self.cl_start_of_dx(x[1], &dy_rows)).transpose()?;
        let mut gradients = vec![None; 4];
        if let (Some(dx), true) = (&dx, self.plan.backward == Way::Panel) {
            let fused = self.dropout.is_none();
            if wide { layer.panel_up(fused, &dy_rows, dx)? } else { layer.panel_down(fused, &dy_rows, dx)? }
        }
        // What is left of dx to the factored way.
        let factored = dx.as_ref().filter(|_| self.plan.backward == Way::Factored);
        if diagonals {
            let input = if self.plan.keep_h { None } else { Some(self.cl_adapter_input(x[0])?) };
            let (u, v) = match (&input, wide) {
                (Some(input), false) => (input, Large::Tokens(&dy_rows)),
                (Some(input), true) => (&dy_rows, Large::Tokens(input)),
                (None, _) => (&dy_rows, Large::Kept(&aux[0])),
            };
            let [d_lambda, d_gamma] = match (v, self.plan.backward, self.bases.structure()) {
                // Block bases need no panel of the dense gradient, which would cost more.
                (Large::Tokens(v), Way::Panel, Structure::Dense) => layer.panel_pull(u, v)?,
                (v, ..) => layer.factored_backward(u, v, factored)?,
            };
            (gradients[2], gradients[3]) = (Some(d_lambda), Some(d_gamma));
        } else if let Some(dx) = factored {
            if wide { layer.factored_up(&dy_rows, dx)? } else { layer.factored_down(&dy_rows, dx, None)? }
        }
        if let (Some(made), Some((p, key))) = (&dx, self.dropout) {
            // The mask is not for W0's part.
            dx = Some(compute::accumulate(cl_masked(made, key, p)?, &cl_product(1.0, &dy_rows, x[1])?)?);
        }
        gradients[0] = dx.map(|dx| compute::reshape(&dx, *x[0].shape())).transpose()?;
        // The engine sums it over the rows.
        gradients.extend((need.get(4) == Some(&true)).then(|| Some(dy.clone())));
        Ok(gradients)
    }

    /// What the adapter's part of dx is added to: W0's part in the factored way, where no mask comes between.
    fn cl_start_of_dx(&self, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
        if self.plan.backward == Way::Factored && self.dropout.is_none() {
            return cl_product(1.0, dy, weight);
        }
        let shape = Shape::new(&[self.sizes.tokens, self.sizes.inputs])?;
        Tensor::zeros(shape, DType::F32, dy.device())
    }

    /// Whether in > out.
    fn is_wide(&self) -> bool {
        self.sizes.inputs > self.sizes.outputs
    }
}
