//! The task vectors that aTLAS combines in the demo: the base, fine-tuned on two shifts of the digits that the
//! new task is made of, each alone. Only the weights that are adapted later are trained, so that all that is
//! learned is in the vector, and on the training split; nothing is chosen or judged by these trainings.

use randlora::Result;
use randlora::adapters::{Targets, TaskVector, task_vector, train_only};

use super::experiment::{EPOCHS, Experiment, TARGETS, Task};

/// The shifts, each with its seed, which no other training has.
const SHIFTS: [(Task, u64); 2] = [(Task::Mirrored, 200), (Task::Negative, 201)];
/// What the demo finds best for `full` on the new task.
const RATE: f64 = 1e-2;

impl Experiment {
    /// Steps of making them, for the progress.
    pub(super) fn vector_steps(&self) -> u64 {
        SHIFTS.len() as u64 * self.steps()
    }

    /// The task vectors of the base with these parameters.
    pub(super) fn task_vectors(&self, base: &[f32], on_step: &mut dyn FnMut(u64)) -> Result<Vec<TaskVector>> {
        SHIFTS.iter().map(|shift| self.task_vector(base, *shift, EPOCHS, on_step)).collect()
    }

    fn task_vector(
        &self,
        base: &[f32],
        (task, seed): (Task, u64),
        epochs: usize,
        on_step: &mut dyn FnMut(u64),
    ) -> Result<TaskVector> {
        let mut tuned = self.load(base)?;
        let weights = TARGETS.map(|layer| format!("{layer}.weight"));
        train_only(&mut tuned, &weights.each_ref().map(String::as_str))?;
        self.fit(&mut tuned, task, (RATE, epochs, seed), &mut |_, _| {
            on_step(1);
            Ok(())
        })?;
        task_vector(&self.load(base)?, &tuned, &Targets::names(&TARGETS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::demo::experiment::numbers;

    #[test]
    fn each_shift_changes_every_adapted_layer_in_its_own_way() -> Result<()> {
        let experiment = Experiment::new();
        let base = numbers(&experiment.model()?)?;
        let vector = |shift| experiment.task_vector(&base, shift, 1, &mut |_| {});
        let [first, again, other] = [SHIFTS[0], SHIFTS[0], SHIFTS[1]].map(vector);
        let (first, again, other) = (first?, again?, other?);
        assert_eq!(first.len(), 18);
        for (layer, tau) in &first {
            let values = tau.to_vec::<f32>()?;
            assert_eq!(values, again[layer].to_vec::<f32>()?);
            assert_ne!(values, other[layer].to_vec::<f32>()?);
            assert!(values.iter().any(|&x| x != 0.0), "{layer}");
        }
        Ok(())
    }
}
