//! The slow twin: arrays of f64 and one closure per element. What the kernels are tested against.

/// An array with its elements in order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Naive {
    pub(crate) dims: Vec<usize>,
    pub(crate) data: Vec<f64>,
}

impl Naive {
    /// The array whose element at `index` is `f(index)`.
    pub(crate) fn build(dims: &[usize], mut f: impl FnMut(&[usize]) -> f64) -> Naive {
        let n: usize = dims.iter().product();
        let data = (0..n).map(|flat| f(&unflatten(flat, dims))).collect();
        Naive { dims: dims.to_vec(), data }
    }

    /// The element at `index`; dimensions of size 1 and missing ones repeat.
    pub(crate) fn at(&self, index: &[usize]) -> f64 {
        let index = &index[index.len() - self.dims.len()..];
        let flat =
            index.iter().zip(&self.dims).fold(0, |flat, (&i, &d)| flat * d + if d == 1 { 0 } else { i });
        self.data[flat]
    }

    pub(crate) fn map(&self, f: impl Fn(f64) -> f64) -> Naive {
        Naive { dims: self.dims.clone(), data: self.data.iter().map(|&x| f(x)).collect() }
    }

    /// f of pairs, broadcast.
    pub(crate) fn zip(&self, other: &Naive, f: impl Fn(f64, f64) -> f64) -> Naive {
        let rank = self.dims.len().max(other.dims.len());
        let size = |n: &Naive, i: usize| (i + n.dims.len()).checked_sub(rank).map_or(1, |i| n.dims[i]);
        let dims: Vec<usize> = (0..rank)
            .map(|i| match (size(self, i), size(other, i)) {
                (1, b) => b,
                (a, _) => a,
            })
            .collect();
        Naive::build(&dims, |i| f(self.at(i), other.at(i)))
    }

    /// `f` of each line along the last dimension, which it may make longer or shorter.
    pub(crate) fn lines(&self, f: impl Fn(&[f64]) -> Vec<f64>) -> Naive {
        let (&width, outer) = self.dims.split_last().expect("at least one dimension");
        let lines: usize = outer.iter().product();
        let data: Vec<Vec<f64>> = (0..lines).map(|i| f(&self.data[i * width..(i + 1) * width])).collect();
        let new_width = data.first().map_or_else(|| f(&vec![0.0; width]).len(), Vec::len);
        let mut dims = outer.to_vec();
        dims.push(new_width);
        Naive { dims, data: data.concat() }
    }
}

/// The index of the `flat`th element in order.
pub(crate) fn unflatten(flat: usize, dims: &[usize]) -> Vec<usize> {
    let mut rest = flat;
    let mut index: Vec<usize> = dims
        .iter()
        .rev()
        .map(|&d| {
            let i = rest % d;
            rest /= d;
            i
        })
        .collect();
    index.reverse();
    index
}
