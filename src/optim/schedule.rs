//! How the learning rate changes during training.

use std::f64::consts::PI;

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// The full learning rate to the end.
    Constant,
    /// A straight line down to 0.
    Linear,
    /// Half a cosine wave down to 0.
    Cosine,
}

/// A factor for the learning rate at every step: a straight line from 0 to 1 over the warm-up's
/// steps, then the decay. As in Hugging Face's transformers, so that runs compare: the first step
/// of a warm-up has the factor 0, and 0 is reached again one step after the last.
///
/// ```
/// use randlora::optim::{Decay, Schedule};
///
/// let schedule = Schedule { warmup: 10, decay: Decay::Linear };
/// assert_eq!([0, 5, 10, 60, 109].map(|step| schedule.at(step, 110)), [0.0, 0.5, 1.0, 0.5, 0.01]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The steps over which the factor rises.
    pub warmup: usize,
    /// What follows.
    pub decay: Decay,
}

impl Schedule {
    /// The full learning rate from beginning to end.
    pub const CONSTANT: Schedule = Schedule { warmup: 0, decay: Decay::Constant };

    /// The factor at step `step` (0 is the first) of `total`.
    pub fn at(&self, step: usize, total: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let left = total.saturating_sub(step) as f64 / total.saturating_sub(self.warmup).max(1) as f64;
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => left,
            Decay::Cosine => 0.5 * (1.0 - (PI * left).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends() {
        for decay in [Decay::Linear, Decay::Cosine] {
            for (warmup, total) in [(0, 100), (10, 100), (99, 100)] {
                let schedule = Schedule { warmup, decay };
                assert_eq!(schedule.at(warmup, total), 1.0);
                assert_eq!((schedule.at(total, total), schedule.at(total + 5, total)), (0.0, 0.0));
                assert!(warmup == 0 || schedule.at(0, total) == 0.0);
                let falls = |s| schedule.at(s, total) > schedule.at(s + 1, total);
                assert!((warmup..total).all(falls) && !(0..warmup).any(falls));
            }
        }
        assert!((Schedule { warmup: 20, decay: Decay::Cosine }.at(60, 100) - 0.5).abs() < 1e-15);
        assert_eq!(Schedule::CONSTANT.at(0, 1), 1.0);
        assert_eq!(Schedule { warmup: 4, decay: Decay::Constant }.at(1000, 10), 1.0);
    }

    #[test]
    fn a_warm_up_longer_than_the_training_is_no_trouble() {
        let schedule = Schedule { warmup: 10, decay: Decay::Linear };
        assert_eq!([0, 4, 9, 10].map(|s| schedule.at(s, 5)), [0.0, 0.4, 0.9, 0.0]);
        assert_eq!(schedule.at(0, 0), 0.0);
    }
}
