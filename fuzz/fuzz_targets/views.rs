//! Random programs of shapes and views, with senseless numbers among the sensible ones: whatever
//! they do is an error or a tensor whose parts fit together, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use randlora::{Device, Result, Shape, Tensor};

/// Numbers from the input, zeros when it is used up.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// Mostly small, sometimes huge.
    fn size(&mut self) -> usize {
        match self.byte() {
            255 => usize::MAX,
            254 => 1 << 62,
            253 => 1 << 32,
            b => b as usize % 7,
        }
    }

    fn dims(&mut self) -> Vec<usize> {
        (0..self.byte() % 10).map(|_| self.size()).collect()
    }
}

fn step(x: &Tensor, n: &mut Numbers<'_>) -> Result<Tensor> {
    // Summed or multiplied away, a size of 0 leaves the others: 2³² × 0 becomes 2³² zeros. That is an
    // error where memory ends, but the sanitizer stops at the mere request.
    let may_compute = x.dims().iter().map(|&d| d.max(1) as f64).product::<f64>() < 1e5;
    match n.byte() % if may_compute { 14 } else { 10 } {
        0 => x.reshape(n.dims()),
        1 => x.permute(&n.dims()),
        2 => x.transpose(n.size(), n.size()),
        3 => x.slice(n.size(), n.size()..n.size()),
        4 => x.select(n.size(), n.size()),
        5 => x.broadcast_to(n.dims()),
        6 => x.squeeze(n.size()),
        7 => x.unsqueeze(n.size()),
        8 => x.t(),
        9 => x.contiguous(),
        10 => Tensor::concat(&[x, x], n.size()),
        11 => x.sum(&n.dims(), n.byte() % 2 == 0),
        12 => x.add(&x.slice(n.size(), n.size()..n.size())?),
        _ => x.matmul(&x.t()?),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut n = Numbers(data);
    let Ok(shape) = Shape::new(&n.dims()) else { return };
    if shape.numel() > 4096 {
        return;
    }
    let values = (0..shape.numel()).map(|i| i as f64).collect();
    let start =
        Tensor::from_vec(values, shape, &Device::cpu()).expect("as many values as the shape has").track();
    let mut x = start.clone();
    for _ in 0..12 {
        // What is too large to write out is still a fine view.
        if let Ok(next) = step(&x, &mut n)
            && next.numel() <= 4096
        {
            x = next;
        }
    }
    let values = x.to_vec::<f64>().expect("f64 it was");
    assert_eq!(values.len(), x.numel());
    let copy = x.contiguous().expect("small enough").to_vec::<f64>().expect("f64 it was");
    assert!(values.iter().zip(&copy).all(|(a, b)| a.to_bits() == b.to_bits()));
    let gradients = x.sum_all().and_then(|y| y.backward()).expect("every step has a gradient");
    assert_eq!(gradients.of(&start).expect("it leads to the start").shape(), start.shape());
});
