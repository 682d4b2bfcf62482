//! The panel way on an OpenCL device, in the letters of `layer`: W̃ a few columns J at a time in scratch,
//! consumed by the one product that the frozen layer needs anyway. Nothing of W's size is made, and no
//! dense gradient of it.

use super::bases::{Bases, Pairing, Structure};
use super::plan::{Plan, Sizes};
use super::{RandLora, frozen};
use crate::compute;
use crate::dtype::DType;
use crate::error::Result;
use crate::opencl::gemm::gemm;
use crate::opencl::randlora::{Columns, Diagonals};
use crate::opencl::runtime::ClBuffer;
use crate::opencl::{self, View, elementwise};
use crate::ops::dropout::cl_masked;
use crate::ops::linear::{cl_affine, cl_product, cl_rows_of};
use crate::shape::{Layout, Shape};
use crate::tensor::Tensor;

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

    pub(super) fn cl_forward(&self, x: &[&Tensor]) -> Result<Tensor> {
        let (rows, bias) = (compute::rows(x[0])?, x.get(4).copied());
        // One product for both where both see the same x: the sum then begins at the bias.
        let fused = self.dropout.is_none();
        let y = match (fused, bias) {
            (false, bias) => cl_affine(&rows, x[1], bias)?,
            (true, None) => {
                Tensor::zeros([self.sizes.tokens, self.sizes.outputs], DType::F32, rows.device())?
            }
            (true, Some(bias)) => cl_rows_of(bias, self.sizes.tokens)?,
        };
        let (layer, input) = (self.cl_layer(x)?, self.cl_adapter_input(x[0])?);
        match self.is_wide() {
            false => layer.up(fused, &input, &y)?,
            true => layer.down(fused, &input, &y)?,
        }
        compute::reshape(&y, x[0].shape().with_dim(x[0].rank() - 1, self.sizes.outputs)?)
    }

    pub(super) fn cl_vjp(&self, x: &[&Tensor], dy: &Tensor, need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if need[1] {
            return Err(frozen());
        }
        let (layer, rows) = (self.cl_layer(x)?, compute::rows(dy)?);
        let mut gradients = vec![None, None, None, None];
        if need[0] {
            let fused = self.dropout.is_none();
            let mut dx = Tensor::zeros([self.sizes.tokens, self.sizes.inputs], DType::F32, dy.device())?;
            match self.is_wide() {
                false => layer.down(fused, &rows, &dx)?,
                true => layer.up(fused, &rows, &dx)?,
            }
            if let Some((p, key)) = self.dropout {
                dx = compute::accumulate(cl_masked(&dx, key, p)?, &cl_product(&rows, x[1])?)?;
            }
            gradients[0] = Some(compute::reshape(&dx, *x[0].shape())?);
        }
        if need[2] || need[3] {
            let input = self.cl_adapter_input(x[0])?;
            let (u, v) = if self.is_wide() { (&rows, &input) } else { (&input, &rows) };
            let [d_lambda, d_gamma] = layer.pull(u, v)?;
            (gradients[2], gradients[3]) = (Some(d_lambda), Some(d_gamma));
        }
        // The engine sums it over the rows.
        gradients.extend((need.get(4) == Some(&true)).then(|| Some(dy.clone())));
        Ok(gradients)
    }

    /// Whether in > out.
    fn is_wide(&self) -> bool {
        self.sizes.inputs > self.sizes.outputs
    }
}

/// A layer on a device: W̃0, its part of the bases, and its diagonals.
struct ClLayer<'a> {
    sizes: Sizes,
    bases: &'a Bases,
    scale: f64,
    panel: usize,
    /// W̃0 (D×m), a view, of any stored type but f64.
    weight: Tensor,
    a: Tensor,
    /// B: D×c, or D×r of block bases.
    b: Tensor,
    lambda: Tensor,
    gamma: Tensor,
}

/// Scratch for a panel: W̃_J or G_J (D×|J|), and C_J or M_J (c×|J|).
struct Panel {
    w: ClBuffer,
    c: ClBuffer,
}

impl<'a> ClLayer<'a> {
    fn new(
        sizes: Sizes,
        plan: &Plan,
        bases: &'a Bases,
        scale: f64,
        [weight, lambda, gamma]: [&Tensor; 3],
    ) -> Result<ClLayer<'a>> {
        bases.check(sizes)?;
        let (a, b) = bases.on_device(weight.device())?;
        let columns = if bases.structure() == Structure::Block { sizes.rank } else { sizes.columns() };
        let width = b.dims()[1..].iter().product();
        let b = compute::reshape(&b, Shape::new(&[b.dims()[0], width])?)?;
        let b = b.with_layout(b.layout().slice(0, 0..sizes.large())?.slice(1, 0..columns)?);
        let wide = sizes.inputs > sizes.outputs;
        Ok(ClLayer {
            sizes,
            bases,
            scale: scale * bases.factor_of_b(sizes.bases()),
            panel: plan.panel,
            weight: if wide { compute::transpose(weight)? } else { weight.detach() },
            a,
            b,
            lambda: compute::contiguous(lambda)?,
            gamma: compute::contiguous(gamma)?,
        })
    }

    fn diagonals(&self) -> Result<Diagonals<'_>> {
        Ok(Diagonals {
            a: self.a.cl()?,
            lambda: self.lambda.cl()?,
            gamma: self.gamma.cl()?,
            small: self.sizes.small(),
            bases: self.sizes.bases(),
            rank: self.sizes.rank,
            peft: self.bases.pairing() == Pairing::Peft,
        })
    }

    fn scratch(&self) -> Result<Panel> {
        let runtime = self.a.cl()?.data.runtime();
        let widest = self.panel.min(self.sizes.small());
        let c = opencl::floats(runtime, self.sizes.columns() * widest)?;
        Ok(Panel { w: opencl::floats(runtime, self.sizes.large() * widest)?, c })
    }

    fn panels(&self) -> impl Iterator<Item = Columns> + use<> {
        let (small, panel) = (self.sizes.small(), self.panel.max(1));
        (0..small).step_by(panel).map(move |from| Columns { from, width: panel.min(small - from) })
    }

    /// How a matrix with `rows` rows and the columns of a panel lies in scratch.
    fn lies(rows: usize, j: Columns) -> Result<Layout> {
        Ok(Layout::contiguous(Shape::new(&[rows, j.width])?))
    }

    /// W̃_J, or ΔW̃_J without the base, into the panel.
    fn build(&self, j: Columns, base: bool, panel: &Panel) -> Result<()> {
        let (large, lies) = (self.sizes.large(), Self::lies(self.sizes.large(), j)?);
        if base {
            let columns = self.weight.layout().slice(1, j.from..j.from + j.width)?;
            let part = View { layout: &columns, ..self.weight.cl()? };
            elementwise::widen(part, self.weight.dtype(), &panel.w, &lies)?;
        } else {
            elementwise::fill(&panel.w, 0.0, large * j.width)?;
        }
        let diagonals = self.diagonals()?;
        match self.bases.structure() {
            Structure::Block => diagonals.add_blocks(j, self.b.cl()?.data, large, self.scale, &panel.w),
            Structure::Dense => {
                diagonals.fill_c(j, &panel.c)?;
                let c = View { data: &panel.c, layout: &Self::lies(self.sizes.columns(), j)? };
                gemm(self.scale, self.b.cl()?, (c, DType::F32), 1.0, (&panel.w, &lies))
            }
        }
    }

    /// v += u·W̃ᵀ for tokens u (T×m) and v (T×D), with ΔW̃ alone in place of W̃ unless `base`.
    fn up(&self, base: bool, u: &Tensor, v: &Tensor) -> Result<()> {
        let panel = self.scratch()?;
        for j in self.panels() {
            self.build(j, base, &panel)?;
            let columns = u.layout().slice(1, j.from..j.from + j.width)?;
            let transposed = Self::lies(self.sizes.large(), j)?.permute(&[1, 0])?;
            let w = View { data: &panel.w, layout: &transposed };
            let u = View { layout: &columns, ..u.cl()? };
            gemm(1.0, u, (w, DType::F32), 1.0, (v.cl()?.data, v.layout()))?;
        }
        Ok(())
    }

    /// u += v·W̃, as above.
    fn down(&self, base: bool, v: &Tensor, u: &Tensor) -> Result<()> {
        let panel = self.scratch()?;
        for j in self.panels() {
            self.build(j, base, &panel)?;
            let columns = u.layout().slice(1, j.from..j.from + j.width)?;
            let w = View { data: &panel.w, layout: &Self::lies(self.sizes.large(), j)? };
            gemm(1.0, v.cl()?, (w, DType::F32), 1.0, (u.cl()?.data, &columns))?;
        }
        Ok(())
    }

    /// dλ and dγ for tokens u and v: G_J = vᵀ·u_J in the panel's place, M_J = s·Bᵀ·G_J in C's.
    fn pull(&self, u: &Tensor, v: &Tensor) -> Result<[Tensor; 2]> {
        let zeros = |like: &Tensor| Tensor::zeros(like.shape(), DType::F32, like.device());
        let (d_lambda, d_gamma) = (zeros(&self.lambda)?, zeros(&self.gamma)?);
        let (panel, diagonals, large) = (self.scratch()?, self.diagonals()?, self.sizes.large());
        for j in self.panels() {
            let columns = u.layout().slice(1, j.from..j.from + j.width)?;
            let (u, transposed) = (View { layout: &columns, ..u.cl()? }, compute::transpose(v)?);
            let lies = Self::lies(large, j)?;
            gemm(1.0, transposed.cl()?, (u, DType::F32), 0.0, (&panel.w, &lies))?;
            let g = View { data: &panel.w, layout: &lies };
            match self.bases.structure() {
                Structure::Block => {
                    diagonals.pull_blocks(j, self.b.cl()?.data, (&panel.w, large), self.scale, &panel.c)?;
                }
                Structure::Dense => {
                    let transposed = compute::transpose(&self.b)?;
                    let m = Self::lies(self.sizes.columns(), j)?;
                    gemm(self.scale, transposed.cl()?, (g, DType::F32), 0.0, (&panel.c, &m))?;
                }
            }
            diagonals.pull(j, &panel.c, d_lambda.cl()?.data, d_gamma.cl()?.data)?;
        }
        Ok([d_lambda, d_gamma])
    }
}
