//! The training loop.

use std::time::Instant;

use crate::data::Batches;
use crate::error::{Error, Result};
use crate::grad::Gradients;
use crate::nn::{Context, Module};
use crate::optim::{Optimizer, Schedule, clip_gradients, gradient_norm};
use crate::system;
use crate::tensor::Tensor;

/// How a model is trained.
///
/// ```
/// use randlora::data::{Batches, digits::Digits};
/// use randlora::nn::{Init, Linear};
/// use randlora::optim::AdamW;
/// use randlora::train::{Flow, Trainer};
/// use randlora::Device;
///
/// let (digits, device) = (Digits::embedded(), Device::cpu());
/// let mut model = Linear::init(&Init::seeded(0, &device), 64, 10, true)?;
/// let mut losses = vec![];
/// Trainer::new(AdamW::new(), 0.01, 2).fit(
///     &mut model,
///     &Batches::of(digits.split().train, 64, 0)?,
///     |model, rows, ctx| {
///         let (images, labels) = digits.batch(rows, &device)?;
///         model.forward(&images.reshape([rows.len(), 64])?, ctx)?.cross_entropy(&labels, None, 0.0)
///     },
///     |_, progress| {
///         losses.push(progress.loss);
///         Ok(Flow::Continue)
///     },
/// )?;
/// assert!(losses[losses.len() - 1] < 0.6 * losses[0]);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Trainer<O> {
    /// What makes the steps; it may be used on.
    pub optimizer: O,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// The factor of the learning rate at each step; constant by default.
    pub schedule: Schedule,
    /// How many times every example is seen.
    pub epochs: usize,
    /// The batches that make one step: their gradients add up to that of one large batch. 1 by
    /// default.
    pub accumulate: usize,
    /// The largest norm of all gradients; none by default.
    pub clip: Option<f64>,
    /// The seed of the dropout masks; 0 by default.
    pub seed: u64,
    /// Activation checkpointing, see [`Context::checkpointed`]: the same training with less memory in
    /// more time. Off by default.
    pub checkpoint_activations: bool,
}

/// Whether training goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It goes on, or it went on to its end.
    Continue,
    /// It stops here, or it was stopped.
    Stop,
}

/// Where a training is after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// The number of the step; 0 is the first.
    pub step: usize,
    /// The steps in all.
    pub total: usize,
    /// The number of the epoch; 0 is the first.
    pub epoch: usize,
    /// Whether this was the last step of the epoch.
    pub epoch_ends: bool,
    /// The mean loss of the step's examples before the step.
    pub loss: f64,
    /// The step's learning rate.
    pub learning_rate: f64,
    /// The norm of all gradients, before clipping.
    pub gradient_norm: f64,
    /// Examples a second, over the whole training so far; 0 where the system has no clock
    /// (wasm32-unknown-unknown).
    pub examples_per_second: f64,
}

impl<O: Optimizer> Trainer<O> {
    /// A training with the defaults for all else.
    pub fn new(optimizer: O, learning_rate: f64, epochs: usize) -> Trainer<O> {
        let schedule = Schedule::CONSTANT;
        Trainer {
            optimizer,
            learning_rate,
            schedule,
            epochs,
            accumulate: 1,
            clip: None,
            seed: 0,
            checkpoint_activations: false,
        }
    }

    /// Trains the model's trained parameters.
    ///
    /// `loss` gives the mean loss of the examples with the given numbers, as a single number; what
    /// adapters add to it is added here. `on_step` is called after each step, with the model as it
    /// is then; the training ends where it returns [`Flow::Stop`], which is then the result, or an
    /// error.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting that is out of range. [`Error::NonFinite`] for a loss or a
    /// gradient that is NaN or infinite and [`Error::NoGradient`] for a trained parameter that the
    /// loss does not depend on: in both cases the step has changed nothing. And whatever `loss` and
    /// `on_step` return.
    pub fn fit<M: Module>(
        &mut self,
        model: &mut M,
        batches: &Batches,
        loss: impl Fn(&M, &[usize], &Context) -> Result<Tensor>,
        mut on_step: impl FnMut(&M, &Progress) -> Result<Flow>,
    ) -> Result<Flow> {
        if self.accumulate == 0 {
            return Err(Error::config("accumulate", "a step is made of at least 1 batch"));
        }
        if !(self.learning_rate.is_finite() && self.learning_rate >= 0.0) {
            let message = format!("{} is no learning rate: give a number from 0", self.learning_rate);
            return Err(Error::config("learning rate", message));
        }
        let steps = batches.len().div_ceil(self.accumulate);
        let Some(total) = steps.checked_mul(self.epochs) else {
            let message =
                format!("{} of them have more steps than can be counted: ask for fewer", self.epochs);
            return Err(Error::config("epochs", message));
        };
        let (start, mut seen) = (system::now(), 0);
        for epoch in 0..self.epochs {
            for (i, parts) in batches.epoch(epoch).chunks(self.accumulate).enumerate() {
                let step = epoch * steps + i;
                let learning_rate = self.learning_rate * self.schedule.at(step, total);
                let (loss, mut gradients) = gradients(model, parts, &loss, self.context(step), step)?;
                let gradient_norm = match self.clip {
                    Some(limit) => clip_gradients(model, &mut gradients, limit, step)?,
                    None => gradient_norm(model, &gradients, step)?,
                };
                self.optimizer.step(model, &gradients, learning_rate)?;
                model.after_step(step, &gradients)?;
                drop(gradients);
                seen += count(parts);
                let speed = |start: Instant| seen as f64 / start.elapsed().as_secs_f64().max(1e-9);
                let examples_per_second = start.map_or(0.0, speed);
                let epoch_ends = i + 1 == steps;
                let progress = Progress {
                    step,
                    total,
                    epoch,
                    epoch_ends,
                    loss,
                    learning_rate,
                    gradient_norm,
                    examples_per_second,
                };
                if on_step(model, &progress)? == Flow::Stop {
                    return Ok(Flow::Stop);
                }
            }
        }
        Ok(Flow::Continue)
    }
}

impl<O> Trainer<O> {
    fn context(&self, step: usize) -> Context {
        let ctx = Context::train(self.seed, step as u64);
        if self.checkpoint_activations { ctx.checkpointed() } else { ctx }
    }
}

fn count(parts: &[Vec<usize>]) -> usize {
    parts.iter().map(Vec::len).sum()
}

/// The mean loss of the examples of all parts and its gradients, one part at a time.
fn gradients<M: Module>(
    model: &M,
    parts: &[Vec<usize>],
    loss: impl Fn(&M, &[usize], &Context) -> Result<Tensor>,
    ctx: Context,
    step: usize,
) -> Result<(f64, Gradients)> {
    let (mut mean, mut sum) = (0.0, Gradients::default());
    for (i, rows) in parts.iter().enumerate() {
        let ctx = ctx.enter(i as u64);
        let mut loss = loss(model, rows, &ctx)?;
        if let Some(term) = model.regulariser(&ctx)? {
            loss = loss.add(&term)?;
        }
        // The mean over all is the mean of the parts' means, each weighted by its size.
        let weight = rows.len() as f64 / count(parts) as f64;
        let value = loss.item()?;
        if !value.is_finite() {
            return Err(Error::NonFinite { what: "the loss".into(), step });
        }
        mean += weight * value;
        if weight != 1.0 {
            loss = loss.scale(weight)?;
        }
        sum.accumulate(loss.backward()?)?;
    }
    Ok((mean, sum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::nn::{Init, Linear, Parameter};
    use crate::optim::{AdamW, Sgd};

    /// Two layers to learn a sum with.
    struct Net {
        first: Linear,
        second: Linear,
    }
    crate::module!(Net { first, second });

    fn net(device: &Device) -> Net {
        let init = Init::seeded(0, device);
        Net {
            first: Linear::init(&init.at("first"), 4, 64, true).unwrap(),
            second: Linear::init(&init.at("second"), 64, 1, true).unwrap(),
        }
    }

    fn loss(net: &Net, rows: &[usize], ctx: &Context) -> Result<Tensor> {
        let device = net.first.weight().value().device();
        let x: Vec<f32> =
            rows.iter().flat_map(|&r| (0..4).map(move |i| ((r * 7 + i * 3) % 11) as f32 / 11.0)).collect();
        let y: Vec<f32> = x.chunks(4).map(|x| x.iter().sum()).collect();
        let x = Tensor::from_vec(x, [rows.len(), 4], device)?;
        let hidden = ctx.enter(1).dropout(&net.first.forward(&x, ctx)?.relu()?, 0.1)?;
        let error = net.second.forward(&hidden, ctx)?.sub(&Tensor::from_vec(y, [rows.len(), 1], device)?)?;
        error.mul(&error)?.mean_all()
    }

    fn on(_: &Net, _: &Progress) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    #[test]
    fn it_learns_and_reports() {
        let device = Device::cpu();
        let mut model = net(&device);
        let mut seen: Vec<Progress> = vec![];
        let mut trainer = Trainer { accumulate: 2, clip: Some(5.0), ..Trainer::new(AdamW::new(), 0.01, 20) };
        let flow = trainer.fit(&mut model, &Batches::new(50, 8, 1).unwrap(), loss, |_, progress| {
            seen.push(*progress);
            Ok(Flow::Continue)
        });
        assert_eq!(flow.unwrap(), Flow::Continue);
        // 7 batches make 4 steps, the last of one batch.
        assert_eq!((seen.len(), seen[0].total), (80, 80));
        assert!(
            seen.iter()
                .enumerate()
                .all(|(i, p)| p.step == i && p.epoch == i / 4 && p.epoch_ends == (i % 4 == 3))
        );
        assert!(seen[79].loss < 0.1 * seen[0].loss, "{} {}", seen[0].loss, seen[79].loss);
        assert!(
            seen.iter()
                .all(|p| p.gradient_norm > 0.0 && p.learning_rate == 0.01 && p.examples_per_second > 0.0)
        );
    }

    #[test]
    fn accumulated_batches_are_one_large_batch() {
        let device = Device::cpu();
        let model = net(&device);
        let plain = |rows: &[usize]| loss(&model, rows, &Context::eval().tracked());
        let parts = [vec![0, 1, 2], vec![3, 4, 5], vec![6]];
        let (value, sum) =
            gradients(&model, &parts, |_, rows, _| plain(rows), Context::train(0, 0), 0).unwrap();
        let whole = plain(&parts.concat()).unwrap();
        let want = whole.backward().unwrap();
        assert!((value - whole.item().unwrap()).abs() < 1e-5);
        for (name, p) in model.parameters() {
            let read = |g: &Gradients| g.get(p.leaf()).unwrap().to_vec::<f32>().unwrap();
            for (got, want) in read(&sum).iter().zip(read(&want)) {
                assert!((got - want).abs() < 1e-5, "{name}");
            }
        }
    }

    #[test]
    fn more_steps_than_can_be_counted_are_refused() {
        let mut model = net(&Device::cpu());
        let mut trainer = Trainer::new(Sgd::new(), 0.01, usize::MAX);
        let error = trainer.fit(&mut model, &Batches::new(8, 4, 0).unwrap(), loss, on).unwrap_err();
        assert!(matches!(&error, Error::Config { what: "epochs", .. }), "{error}");
    }

    #[test]
    fn a_stop_is_heard_after_the_step() {
        let mut model = net(&Device::cpu());
        let mut steps = 0;
        let stop = |_: &Net, progress: &Progress| {
            steps += 1;
            Ok(if progress.step == 2 { Flow::Stop } else { Flow::Continue })
        };
        let flow =
            Trainer::new(Sgd::new(), 0.01, 9).fit(&mut model, &Batches::new(8, 8, 0).unwrap(), loss, stop);
        assert_eq!((flow.unwrap(), steps), (Flow::Stop, 3));
    }

    #[test]
    fn nothing_changes_on_a_loss_that_is_not_finite() {
        let mut model = net(&Device::cpu());
        let before = model.state();
        let bad = |net: &Net, rows: &[usize], ctx: &Context| {
            loss(net, rows, ctx)?.sub(&loss(net, rows, ctx)?)?.ln()
        };
        let error = Trainer::new(AdamW::new(), 0.1, 1)
            .fit(&mut model, &Batches::new(8, 8, 0).unwrap(), bad, on)
            .unwrap_err();
        assert!(matches!(&error, Error::NonFinite { what, step: 0 } if what == "the loss"), "{error}");
        // The loss √0 is finite, its gradient is not.
        let bad = |net: &Net, rows: &[usize], ctx: &Context| loss(net, rows, ctx)?.scale(0.0)?.sqrt();
        let error = Trainer::new(AdamW::new(), 0.1, 1)
            .fit(&mut model, &Batches::new(8, 8, 0).unwrap(), bad, on)
            .unwrap_err();
        assert!(
            matches!(&error, Error::NonFinite { what, .. } if what.starts_with("the gradient of `")),
            "{error}"
        );
        for (name, value) in model.state() {
            assert_eq!(value.to_vec::<f32>().unwrap(), before[&name].to_vec::<f32>().unwrap(), "{name}");
        }
    }

    #[test]
    fn a_parameter_that_the_loss_forgets_is_named() {
        struct More {
            net: Net,
            unused: Parameter,
        }
        crate::module!(More { net => "", unused });
        let unused = Parameter::new(Tensor::ones([2], crate::dtype::DType::F32, &Device::cpu()).unwrap());
        let mut model = More { net: net(&Device::cpu()), unused };
        let run = |model: &mut More| {
            let loss = |m: &More, rows: &[usize], ctx: &Context| loss(&m.net, rows, ctx);
            Trainer::new(AdamW::new(), 0.1, 1)
                .fit(model, &Batches::new(8, 8, 0).unwrap(), loss, |_, _| Ok(Flow::Continue))
        };
        assert!(matches!(run(&mut model), Err(Error::NoGradient { parameter }) if parameter == "unused"));
        model.unused.set_trainable(false);
        run(&mut model).unwrap();
    }

    #[test]
    fn a_thousand_steps_leave_live_bytes_flat() {
        let device = Device::cpu();
        let mut model = net(&device);
        let parameters = 4 * model.parameter_count();
        let mut live = vec![];
        let measure = |_: &Net, _: &Progress| {
            live.push(device.memory().live_bytes);
            Ok(Flow::Continue)
        };
        Trainer::new(AdamW::new(), 1e-3, 1000)
            .fit(&mut model, &Batches::new(16, 16, 0).unwrap(), loss, measure)
            .unwrap();
        assert!(live.iter().all(|&l| l == live[0]), "{live:?}");
        // The parameters and two moments of each.
        assert_eq!((live.len(), live[0]), (1000, 3 * parameters));
    }

    #[test]
    fn the_same_bits_on_any_number_of_threads() {
        let train = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut model = net(&Device::cpu());
                let mut trainer =
                    Trainer { clip: Some(0.5), accumulate: 2, ..Trainer::new(AdamW::new(), 0.01, 2) };
                trainer.fit(&mut model, &Batches::new(12_000, 6000, 3).unwrap(), loss, on).unwrap();
                model
                    .state()
                    .into_values()
                    .flat_map(|v| v.to_vec::<f32>().unwrap())
                    .map(f32::to_bits)
                    .collect::<Vec<_>>()
            })
        };
        let one = train(1);
        assert!([2, 3, 7].into_iter().all(|threads| train(threads) == one));
    }
}
