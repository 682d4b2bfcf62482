//! Layer norm and RMS norm over rows of elements that lie one after another.

use super::elementwise::full;
use super::runtime::{Arg, ClBuffer, Grid, Source};
use super::{View, floats};
use crate::error::Result;
use crate::shape::{Layout, Shape};

static SOURCE: Source = Source { name: "norm.cl", text: include_str!("../../kernels/norm.cl") };

/// Rows, and how they are normed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    pub(crate) x: View<'a>,
    pub(crate) centred: bool,
    pub(crate) eps: f64,
}

impl Rows<'_> {
    fn width(&self) -> usize {
        self.x.layout.shape().last().copied().unwrap_or(1)
    }

    /// One group a row.
    fn grid(&self) -> Grid {
        Grid::groups(self.x.numel() / self.width().max(1))
    }

    /// The arguments that every kernel here ends in.
    fn settings<'b>(&self) -> [Arg<'b>; 3] {
        [Arg::Size(self.width()), Arg::U32(self.centred.into()), Arg::F32(self.eps as f32)]
    }

    /// One number for all places of a row.
    fn repeated(&self) -> Result<Layout> {
        Layout::contiguous(Shape::new(&[1])?).broadcast_to(&Shape::new(&[self.width()])?, "norm")
    }

    /// The rows normed, times `w` and with `b` added.
    pub(crate) fn forward(&self, w: View<'_>, b: Option<View<'_>>) -> Result<ClBuffer> {
        let (runtime, repeated) = (self.x.runtime(), self.repeated()?);
        let zero = full(runtime, 0.0, 1)?;
        let b = b.unwrap_or(View { data: &zero, layout: &repeated });
        let y = floats(runtime, self.x.numel())?;
        let args = [&self.x.in_order()[..], &w.strided(), &b.strided(), &[Arg::Buffer(&y)], &self.settings()];
        runtime.launch(&SOURCE, "norm", &args.concat(), self.grid())?;
        Ok(y)
    }

    /// The gradient of the rows.
    pub(crate) fn dx(&self, w: View<'_>, dy: View<'_>) -> Result<ClBuffer> {
        let runtime = self.x.runtime();
        let dx = floats(runtime, self.x.numel())?;
        let args =
            [&self.x.in_order()[..], &w.strided(), &dy.in_order(), &[Arg::Buffer(&dx)], &self.settings()];
        runtime.launch(&SOURCE, "norm_dx", &args.concat(), self.grid())?;
        Ok(dx)
    }

    /// What each row adds to the gradient of the weight.
    pub(crate) fn dw(&self, dy: View<'_>) -> Result<ClBuffer> {
        let dw = floats(self.x.runtime(), self.x.numel())?;
        let args = [&self.x.in_order()[..], &dy.in_order(), &[Arg::Buffer(&dw)], &self.settings()];
        self.x.runtime().launch(&SOURCE, "norm_dw", &args.concat(), self.grid())?;
        Ok(dw)
    }
}
