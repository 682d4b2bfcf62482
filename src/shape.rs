//! Shapes, and layouts: how the elements of a shape lie in a buffer.

use std::fmt;
use std::ops::{Deref, Range};

use crate::error::{Error, Result};

/// The largest number of dimensions a tensor can have.
pub const MAX_RANK: usize = 8;

/// The size of a tensor along each of its dimensions, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    rank: u8,
}

impl Shape {
    /// The shape with these sizes; an error beyond [`MAX_RANK`] dimensions or where the number of
    /// elements overflows.
    pub fn new(dims: &[usize]) -> Result<Shape> {
        if dims.len() > MAX_RANK {
            let message = format!("{} dimensions where at most {MAX_RANK} are possible", dims.len());
            return Err(Error::shape("shape", message));
        }
        // Zeros are left out: a view of an empty tensor must not overflow either.
        let span = dims.iter().filter(|&&d| d > 0).try_fold(8usize, |n, &d| n.checked_mul(d));
        if span.is_none_or(|n| n > isize::MAX as usize) {
            return Err(Error::shape("shape", format!("{dims:?} has more elements than memory can address")));
        }
        let mut shape = Shape { dims: [0; MAX_RANK], rank: dims.len() as u8 };
        shape.dims[..dims.len()].copy_from_slice(dims);
        Ok(shape)
    }

    /// The shape of a single number.
    pub fn scalar() -> Shape {
        Shape { dims: [0; MAX_RANK], rank: 0 }
    }

    /// The sizes.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// The number of elements: the product of the sizes.
    pub fn numel(&self) -> usize {
        self.dims().iter().product()
    }

    /// The shape that both broadcast to: dimensions are aligned at the end, and a size of 1 (or a
    /// missing dimension) stretches to the other's size.
    pub fn broadcast(&self, other: &Shape, op: &'static str) -> Result<Shape> {
        let rank = self.rank().max(other.rank());
        let mut dims = [0; MAX_RANK];
        for (i, dim) in dims[..rank].iter_mut().enumerate() {
            *dim = match (self.size_from_end(rank - 1 - i), other.size_from_end(rank - 1 - i)) {
                (a, b) if a == b => a,
                (1, b) => b,
                (a, 1) => a,
                (a, b) => {
                    let message =
                        format!("{self} and {other} do not broadcast: dimension {i} is {a} against {b}");
                    return Err(Error::shape(op, message));
                }
            };
        }
        Shape::new(&dims[..rank])
    }

    /// The size of the `i`th dimension from the end, 1 where there is none.
    fn size_from_end(&self, i: usize) -> usize {
        if i < self.rank() { self.dims[self.rank() - 1 - i] } else { 1 }
    }

    /// The same shape with one size changed; an error where there is no such dimension.
    pub fn with_dim(&self, dim: usize, size: usize) -> Result<Shape> {
        let mut shape = *self;
        shape.dims[self.check_dim(dim, "shape")?] = size;
        Shape::new(shape.dims())
    }

    /// `dim` itself if there is such a dimension.
    pub fn check_dim(&self, dim: usize, op: &'static str) -> Result<usize> {
        if dim < self.rank() {
            return Ok(dim);
        }
        Err(Error::shape(op, format!("{self} has no dimension {dim}; it has {}", self.rank())))
    }

    /// Whether elements of this shape fill `other` when broadcast.
    pub(crate) fn broadcasts_to(&self, other: &Shape) -> bool {
        self.broadcast(other, "").is_ok_and(|s| s == *other)
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        self.dims()
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a function that wants a shape accepts: an array, a slice, a vector, a [`Shape`].
pub trait IntoShape {
    /// The shape, or why it is none.
    fn into_shape(self) -> Result<Shape>;
}

impl IntoShape for Shape {
    fn into_shape(self) -> Result<Shape> {
        Ok(self)
    }
}
impl IntoShape for &Shape {
    fn into_shape(self) -> Result<Shape> {
        Ok(*self)
    }
}
impl IntoShape for &[usize] {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(self)
    }
}
impl IntoShape for Vec<usize> {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&self)
    }
}
impl<const N: usize> IntoShape for [usize; N] {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&self)
    }
}
impl<const N: usize> IntoShape for &[usize; N] {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(self)
    }
}

/// Where the elements of a shape lie in a buffer: element (i, j, …) at
/// `offset + i·strides[0] + j·strides[1] + …`. A stride of 0 repeats an element.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    shape: Shape,
    strides: [usize; MAX_RANK],
    offset: usize,
}

impl Layout {
    /// Elements one after another, the last dimension varying fastest.
    pub fn contiguous(shape: Shape) -> Layout {
        let mut strides = [0; MAX_RANK];
        let mut step = 1;
        for i in (0..shape.rank()).rev() {
            strides[i] = step;
            step *= shape[i].max(1);
        }
        Layout { shape, strides, offset: 0 }
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The distance in elements between neighbours along each dimension.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.shape.rank()]
    }

    /// Where the first element lies.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Whether the elements lie one after another.
    pub fn is_contiguous(&self) -> bool {
        self.shape.numel() == 0 || {
            let mut step = 1;
            self.shape.iter().zip(self.strides()).rev().all(|(&size, &stride)| {
                let in_line = size == 1 || stride == step;
                step *= size;
                in_line
            })
        }
    }

    /// The dimensions as (size, stride), outermost first, neighbours merged where one stride walks
    /// through both, sizes of 1 left out.
    fn runs(&self) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::with_capacity(MAX_RANK);
        for (&size, &stride) in self.shape.iter().zip(self.strides()).filter(|&(&size, _)| size != 1) {
            match runs.last_mut() {
                Some((outer, step)) if *step == size * stride => (*outer, *step) = (*outer * size, stride),
                _ => runs.push((size, stride)),
            }
        }
        runs
    }

    /// The range of the buffer that holds the elements, where they are contiguous.
    pub fn contiguous_range(&self) -> Option<Range<usize>> {
        self.is_contiguous().then(|| self.offset..self.offset + self.shape.numel())
    }

    /// The same layout starting elsewhere.
    pub(crate) fn at(self, offset: usize) -> Layout {
        Layout { offset, ..self }
    }

    /// The same elements in the same order in as few dimensions as can be.
    pub(crate) fn merged(&self) -> Layout {
        let mut layout = Layout { shape: Shape::scalar(), strides: [0; MAX_RANK], offset: self.offset };
        for (i, (size, stride)) in self.runs().into_iter().enumerate() {
            (layout.shape.dims[i], layout.strides[i]) = (size, stride);
            layout.shape.rank = i as u8 + 1;
        }
        layout
    }

    /// The layout of the first elements along all but the first `rank` dimensions.
    pub(crate) fn leading(&self, rank: usize) -> Layout {
        let mut layout = *self;
        layout.shape.rank = rank.min(self.shape.rank()) as u8;
        layout.shape.dims[rank..].fill(0);
        layout.strides[rank..].fill(0);
        layout
    }

    /// One past the largest position that an element has.
    pub(crate) fn end(&self) -> usize {
        if self.shape.numel() == 0 {
            return 0;
        }
        let last: usize = self.shape.iter().zip(self.strides()).map(|(&d, &s)| (d - 1) * s).sum();
        self.offset + last + 1
    }

    /// Dimension i of the result is dimension `order[i]` of this one.
    pub fn permute(&self, order: &[usize]) -> Result<Layout> {
        let rank = self.shape.rank();
        let mut seen = [false; MAX_RANK];
        if order.len() != rank || order.iter().any(|&d| d >= rank || std::mem::replace(&mut seen[d], true)) {
            let message = format!("{order:?} is no order of the {rank} dimensions of {}", self.shape);
            return Err(Error::shape("permute", message));
        }
        let mut layout = *self;
        for (i, &d) in order.iter().enumerate() {
            layout.shape.dims[i] = self.shape.dims[d];
            layout.strides[i] = self.strides[d];
        }
        Ok(layout)
    }

    /// The part `range` of dimension `dim`.
    pub fn slice(&self, dim: usize, range: Range<usize>) -> Result<Layout> {
        self.shape.check_dim(dim, "slice")?;
        let size = self.shape[dim];
        if range.start > range.end || range.end > size {
            let message = format!(
                "{}..{} does not lie in 0..{size}, dimension {dim} of {}",
                range.start, range.end, self.shape
            );
            return Err(Error::shape("slice", message));
        }
        let mut layout = *self;
        layout.shape.dims[dim] = range.end - range.start;
        // An empty part may start one past the end, where there is nothing to point at.
        if !range.is_empty() {
            layout.offset += range.start * self.strides[dim];
        }
        Ok(layout)
    }

    /// The same elements repeated to fill `shape`, by strides of 0.
    pub fn broadcast_to(&self, shape: &Shape, op: &'static str) -> Result<Layout> {
        if !self.shape.broadcasts_to(shape) {
            return Err(Error::shape(op, format!("{} does not broadcast to {shape}", self.shape)));
        }
        let missing = shape.rank() - self.shape.rank();
        let mut layout = Layout { shape: *shape, strides: [0; MAX_RANK], offset: self.offset };
        for i in missing..shape.rank() {
            let own = i - missing;
            layout.strides[i] = if self.shape[own] == 1 { 0 } else { self.strides[own] };
        }
        Ok(layout)
    }

    /// The same elements in the same order under another shape; None where that needs a copy.
    pub(crate) fn reshape(&self, shape: &Shape) -> Option<Layout> {
        debug_assert_eq!(self.shape.numel(), shape.numel());
        if self.is_contiguous() {
            return Some(Layout { offset: self.offset, ..Layout::contiguous(*shape) });
        }
        let mut layout = Layout { shape: *shape, strides: [0; MAX_RANK], offset: self.offset };
        // From the end, each new dimension takes its share of a run of old ones.
        let runs = self.runs();
        let mut runs = runs.iter().rev();
        let (mut run, mut taken) = (runs.next(), 1);
        for i in (0..shape.rank()).rev().filter(|&i| shape[i] != 1) {
            let &(size, stride) = run?;
            layout.strides[i] = stride * taken;
            taken *= shape[i];
            if size % taken != 0 {
                return None;
            }
            if size == taken {
                (run, taken) = (runs.next(), 1);
            }
        }
        Some(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every position of a layout in order: the slow twin of every kernel's walk.
    fn positions(layout: &Layout) -> Vec<usize> {
        let mut all = Vec::new();
        for flat in 0..layout.shape.numel() {
            let (mut rest, mut at) = (flat, layout.offset);
            for i in (0..layout.shape.rank()).rev() {
                at += rest % layout.shape[i] * layout.strides[i];
                rest /= layout.shape[i];
            }
            all.push(at);
        }
        all
    }

    proptest! {
        #[test]
        fn reshape_keeps_the_order(
            dims in prop::collection::vec(1usize..4, 0..5),
            swap in any::<(prop::sample::Index, prop::sample::Index)>(),
            cut in any::<(prop::sample::Index, bool)>(),
            split in prop::collection::vec(1usize..5, 0..4),
        ) {
            let mut layout = Layout::contiguous(Shape::new(&dims).unwrap());
            if !dims.is_empty() {
                let mut order: Vec<usize> = (0..dims.len()).collect();
                order.swap(swap.0.index(dims.len()), swap.1.index(dims.len()));
                layout = layout.permute(&order).unwrap();
                let dim = cut.0.index(dims.len());
                if cut.1 && layout.shape[dim] > 1 {
                    layout = layout.slice(dim, 1..layout.shape[dim]).unwrap();
                }
            }
            // A target with the same number of elements: divide by the factors that fit.
            let mut rest = layout.shape.numel();
            let mut target = Vec::new();
            for f in split {
                if rest.is_multiple_of(f) { target.push(f); rest /= f; }
            }
            target.push(rest);
            let target = Shape::new(&target).unwrap();
            prop_assert_eq!(positions(&layout.merged()), positions(&layout));
            if let Some(view) = layout.reshape(&target) {
                prop_assert_eq!(positions(&view), positions(&layout));
            } else {
                prop_assert!(!layout.is_contiguous());
            }
        }
    }

    #[test]
    fn reshape_finds_views() {
        let l = Layout::contiguous(Shape::new(&[4, 6, 5]).unwrap()).slice(2, 0..3).unwrap();
        assert!(l.reshape(&Shape::new(&[24, 3]).unwrap()).is_some());
        assert!(l.reshape(&Shape::new(&[2, 2, 3, 2, 3, 1]).unwrap()).is_some());
        assert!(l.reshape(&Shape::new(&[72]).unwrap()).is_none());
        let t = l.permute(&[1, 0, 2]).unwrap();
        assert!(t.reshape(&Shape::new(&[24, 3]).unwrap()).is_none());
        assert!(t.reshape(&Shape::new(&[2, 3, 4, 3]).unwrap()).is_some());
    }

    #[test]
    fn overflow_is_an_error() {
        assert!(Shape::new(&[usize::MAX, 2]).is_err());
        assert!(Shape::new(&[0, usize::MAX, 2]).is_err());
        assert!(Shape::new(&[1; 9]).is_err());
        assert!(Shape::new(&[1 << 60]).is_err());
    }

    #[test]
    fn broadcasting() {
        let s = |d: &[usize]| Shape::new(d).unwrap();
        assert_eq!(s(&[3, 1]).broadcast(&s(&[4]), "").unwrap(), s(&[3, 4]));
        assert_eq!(s(&[]).broadcast(&s(&[0]), "").unwrap(), s(&[0]));
        assert_eq!(s(&[1]).broadcast(&s(&[0]), "").unwrap(), s(&[0]));
        assert!(s(&[2]).broadcast(&s(&[3]), "").is_err());
    }
}
