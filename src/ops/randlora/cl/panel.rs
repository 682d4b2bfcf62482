//! The panel way: W̃ a few columns J at a time in scratch, consumed by the one product that the frozen layer needs
//! anyway.

use super::layer::{ClLayer, Scratch};
use crate::compute;
use crate::dtype::DType;
use crate::error::Result;
use crate::opencl::gemm::gemm;
use crate::opencl::randlora::Part;
use crate::opencl::{View, elementwise};
use crate::tensor::Tensor;

/// Scratch for a panel: W̃_J or G_J (D×|J|), and C_J or M_J (c×|J|).
struct Panel {
    w: Scratch,
    c: Scratch,
}

impl ClLayer<'_> {
    fn panel(&self) -> Result<Panel> {
        let widest = self.plan.panel.min(self.sizes.small());
        // Of block bases no C is made.
        let c = if self.is_block() { 0 } else { self.sizes.columns() * widest };
        Ok(Panel { w: self.scratch(self.sizes.large() * widest)?, c: self.scratch(c)? })
    }

    fn panels(&self) -> impl Iterator<Item = Part> + use<> {
        let (small, panel, rows) = (self.sizes.small(), self.plan.panel.max(1), self.all_columns());
        (0..small)
            .step_by(panel)
            .map(move |from| Part { rows: rows.clone(), columns: from..small.min(from + panel) })
    }

    /// W̃_J, or ΔW̃_J without the base, into the panel.
    fn build(&self, part: &Part, base: bool, panel: &mut Panel) -> Result<()> {
        let large = self.sizes.large();
        panel.w.shaped(large, part.columns.len())?;
        if base {
            let columns = self.weight.layout().slice(1, part.columns.clone())?;
            let from = View { layout: &columns, ..self.weight.cl()? };
            elementwise::widen(from, self.weight.dtype(), &panel.w.data, &panel.w.layout)?;
        } else {
            elementwise::fill(&panel.w.data, 0.0, large * part.columns.len())?;
        }
        self.add_update(part, &panel.w, &mut panel.c)
    }

    /// v += u·W̃ᵀ for tokens u (T×m) and v (T×D), with ΔW̃ alone in place of W̃ unless `base`.
    pub(super) fn panel_up(&self, base: bool, u: &Tensor, v: &Tensor) -> Result<()> {
        let mut panel = self.panel()?;
        for part in self.panels() {
            self.build(&part, base, &mut panel)?;
            let (columns, turned) =
                (u.layout().slice(1, part.columns.clone())?, panel.w.layout.permute(&[1, 0])?);
            let (u, w) =
                (View { layout: &columns, ..u.cl()? }, View { data: &panel.w.data, layout: &turned });
            gemm(1.0, u, (w, DType::F32), 1.0, (v.cl()?.data, v.layout()))?;
        }
        Ok(())
    }

    /// u += v·W̃, as above.
    pub(super) fn panel_down(&self, base: bool, v: &Tensor, u: &Tensor) -> Result<()> {
        let mut panel = self.panel()?;
        for part in self.panels() {
            self.build(&part, base, &mut panel)?;
            let columns = u.layout().slice(1, part.columns.clone())?;
            gemm(1.0, v.cl()?, (panel.w.view(), DType::F32), 1.0, (u.cl()?.data, &columns))?;
        }
        Ok(())
    }

    /// dλ and dγ for tokens u and v: G_J = vᵀ·u_J in the panel's place, M_J = s·Bᵀ·G_J in C's.
    pub(super) fn panel_pull(&self, u: &Tensor, v: &Tensor) -> Result<[Tensor; 2]> {
        let (to, mut panel, turned) = (self.no_gradients()?, self.panel()?, compute::transpose(v)?);
        for part in self.panels() {
            let columns = u.layout().slice(1, part.columns.clone())?;
            panel.w.shaped(self.sizes.large(), part.columns.len())?;
            let u = View { layout: &columns, ..u.cl()? };
            gemm(1.0, turned.cl()?, (u, DType::F32), 0.0, (&panel.w.data, &panel.w.layout))?;
            self.gradient_of_c(&panel.w, &mut panel.c)?;
            self.pull(&part, &panel.c, &to)?;
        }
        Ok(to)
    }
}
