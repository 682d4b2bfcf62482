//! What the benches share: medians of interleaved runs, so that a noisy neighbour on the machine
//! hits all rows of a table alike.

use std::time::Instant;

/// The median time of each function in milliseconds, over `rounds` rounds in which each runs once.
pub(crate) fn medians(rounds: usize, runs: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut times = vec![Vec::with_capacity(rounds); runs.len()];
    for run in runs.iter_mut() {
        run(); // Warm up.
    }
    for _ in 0..rounds {
        for (run, times) in runs.iter_mut().zip(&mut times) {
            let start = Instant::now();
            run();
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times
        .into_iter()
        .map(|mut t| {
            t.sort_by(f64::total_cmp);
            t[t.len() / 2]
        })
        .collect()
}
