//! The demo's experiment: the model, the two tasks, and how one method is trained and judged.

use std::time::Instant;

use randlora::adapters::{self, Atlas, Distribution, RandLora, Settings, Start, Targets, TaskVector};
use randlora::data::Batches;
use randlora::data::digits::{Digits, Split};
use randlora::models::{Vit, VitConfig};
use randlora::nn::{Activation, Context, Init, Module};
use randlora::optim::{AdamW, Decay, Schedule};
use randlora::train::{Flow, Progress, Trainer};
use randlora::{Device, Result, Structure, Tensor, analysis};

/// What the images show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// The digits as they were written: what the base is trained on.
    Upright,
    /// The same digits mirrored along the diagonal, with ink and paper exchanged: what it is
    /// adapted to.
    MirroredNegative,
    /// Mirrored alone.
    Mirrored,
    /// With ink and paper exchanged alone.
    Negative,
}

/// A way to adapt the base, and the learning rates to choose from.
#[derive(Clone, Copy)]
pub(super) struct Method {
    pub(super) name: &'static str,
    rank: usize,
    scale: Option<f64>,
    learning_rates: &'static [f64],
}

impl Method {
    /// The learning rates to choose from: these, or if there are none its own.
    pub(super) fn rates<'a>(&self, asked: &'a [f64]) -> &'a [f64] {
        if asked.is_empty() { self.learning_rates } else { asked }
    }
}

/// What is shown where nothing else is asked for.
pub(super) const DEFAULT: [&str; 4] = ["probe", "lora", "randlora", "full"];

const FEW: &[f64] = &[3e-3, 1e-2, 3e-2, 1e-1];
const THIN: &[f64] = &[1e-3, 3e-3, 1e-2, 3e-2];

/// r = 8 for RandLoRA and r = 3 for LoRA train exactly as many numbers in these layers. Each grid of the
/// four that are shown by default reaches beyond the best value on both sides.
pub(super) const METHODS: [Method; 20] = [
    Method { name: "probe", rank: 0, scale: None, learning_rates: &[1.0, 3.0, 10.0] },
    Method { name: "lora", rank: 3, scale: Some(2.0), learning_rates: &[3e-3, 1e-2, 3e-2] },
    Method {
        name: "randlora",
        rank: 8,
        scale: Some(RandLora::PEFT_SCALE),
        learning_rates: &[1e-3, 3e-3, 1e-2],
    },
    Method { name: "full", rank: 0, scale: None, learning_rates: &[3e-3, 1e-2, 3e-2] },
    Method { name: "randlora-auto", rank: 8, scale: None, learning_rates: &[1e-2, 3e-2, 1e-1] },
    Method { name: "randlora-block", rank: 8, scale: None, learning_rates: &[1e-2, 3e-2, 1e-1] },
    Method { name: "randlora-sparse", rank: 8, scale: None, learning_rates: &[1e-2, 3e-2, 1e-1] },
    Method { name: "rslora", rank: 3, scale: None, learning_rates: THIN },
    Method { name: "dora", rank: 3, scale: Some(2.0), learning_rates: THIN },
    Method { name: "pissa", rank: 3, scale: Some(1.0), learning_rates: THIN },
    Method { name: "adalora", rank: 3, scale: Some(2.0), learning_rates: THIN },
    Method { name: "hydralora", rank: 2, scale: Some(2.0), learning_rates: THIN },
    Method { name: "vera", rank: 64, scale: None, learning_rates: FEW },
    Method { name: "lora-xs", rank: 16, scale: None, learning_rates: FEW },
    Method { name: "svft", rank: 0, scale: None, learning_rates: FEW },
    Method { name: "bitfit", rank: 0, scale: None, learning_rates: FEW },
    Method { name: "nola", rank: 4, scale: None, learning_rates: FEW },
    Method { name: "pranc", rank: 0, scale: None, learning_rates: FEW },
    Method { name: "intrinsic", rank: 0, scale: None, learning_rates: FEW },
    Method { name: ATLAS, rank: 0, scale: None, learning_rates: &[3e-2, 1e-1, 3e-1] },
];

/// The method that needs task vectors.
pub(super) const ATLAS: &str = "atlas";

/// The seeds that each method is judged over.
pub(super) const SEEDS: [u64; 3] = [0, 1, 2];
/// The seed of the first run that a learning rate is chosen by; the others' follow.
const CHOOSING_SEED: u64 = 100;
pub(super) const EPOCHS: usize = 6;
const BASE_EPOCHS: usize = 10;
const BATCH: usize = 32;
/// The name of the classifier, which every method trains.
const HEAD: &str = "classifier";
/// The layers that are adapted.
pub(super) const TARGETS: [&str; 6] =
    ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"];

const MODEL: VitConfig = VitConfig {
    image: 8,
    patch: 2,
    channels: 1,
    width: 48,
    layers: 3,
    heads: 4,
    hidden: 96,
    classes: 10,
    activation: Activation::Gelu,
    eps: 1e-6,
    dropout: 0.0,
    attention_dropout: 0.0,
};

/// One training and what came of it.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) losses: Vec<f64>,
    /// Accuracy on the validation split after each epoch.
    pub(super) validation: Vec<f64>,
    pub(super) test: f64,
    pub(super) seconds: f64,
}

/// What came of a method.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) trained: usize,
    /// The smallest and the largest rank of the adapted layers' updates.
    pub(super) ranks: Option<(usize, usize)>,
    /// The learning rates tried, with the accuracy on the validation split.
    pub(super) tried: Vec<(f64, f64)>,
    pub(super) learning_rate: f64,
    pub(super) runs: Vec<Run>,
}

/// The data, and a model to start from.
pub(super) struct Experiment {
    digits: Digits,
    split: Split,
    device: Device,
}

impl Experiment {
    pub(super) fn new() -> Experiment {
        let digits = Digits::embedded();
        Experiment { split: digits.split(), digits, device: Device::cpu() }
    }

    /// Steps of one run of a method, for the progress.
    pub(super) fn steps(&self) -> u64 {
        (EPOCHS * self.split.train.len().div_ceil(BATCH)) as u64
    }

    /// The same for the base.
    pub(super) fn base_steps(&self) -> u64 {
        (BASE_EPOCHS * self.split.train.len().div_ceil(BATCH)) as u64
    }

    pub(super) fn model(&self) -> Result<Vit> {
        Vit::init(&Init::seeded(0, &self.device), MODEL)
    }

    fn batch(&self, task: Task, rows: &[usize]) -> Result<(Tensor, Vec<u32>)> {
        let (images, labels) = self.digits.batch(rows, &self.device)?;
        let mirrored = |images: Tensor| images.transpose(2, 3);
        let negative = |images: Tensor| images.scale(-1.0)?.add_scalar(1.0);
        let images = match task {
            Task::Upright => images,
            Task::MirroredNegative => negative(mirrored(images)?)?,
            Task::Mirrored => mirrored(images)?,
            Task::Negative => negative(images)?,
        };
        Ok((images, labels))
    }

    fn accuracy(&self, model: &Vit, task: Task, rows: &[usize]) -> Result<f64> {
        let mut right = 0;
        for rows in rows.chunks(256) {
            let (images, labels) = self.batch(task, rows)?;
            let scores = model.forward(&images, &Context::eval())?.to_vec::<f32>()?;
            right += scores.chunks(10).zip(&labels).filter(|(s, label)| best(s) == **label as usize).count();
        }
        Ok(right as f64 / rows.len() as f64)
    }

    /// Trains a model; `on_step` sees it after each step.
    pub(super) fn fit(
        &self,
        model: &mut Vit,
        task: Task,
        (learning_rate, epochs, seed): (f64, usize, u64),
        on_step: &mut dyn FnMut(&Vit, &Progress) -> Result<()>,
    ) -> Result<()> {
        let batches = Batches::of(self.split.train.clone(), BATCH, seed)?;
        let schedule = Schedule { warmup: batches.len() / 2, decay: Decay::Cosine };
        let mut trainer =
            Trainer { schedule, clip: Some(1.0), seed, ..Trainer::new(AdamW::new(), learning_rate, epochs) };
        trainer.fit(
            model,
            &batches,
            |model, rows, ctx| {
                let (images, labels) = self.batch(task, rows)?;
                model.forward(&images, ctx)?.cross_entropy(&labels, None, 0.0)
            },
            |model, progress| on_step(model, progress).map(|()| Flow::Continue),
        )?;
        Ok(())
    }

    /// Trains a model and judges it.
    fn train(
        &self,
        model: &mut Vit,
        task: Task,
        how: (f64, usize, u64),
        on_step: &mut dyn FnMut(u64),
    ) -> Result<Run> {
        let (mut losses, mut validation) = (vec![], vec![]);
        let start = Instant::now();
        let mut aside = 0.0;
        self.fit(model, task, how, &mut |model, progress| {
            losses.push(progress.loss);
            on_step(1);
            if progress.epoch_ends {
                let pause = Instant::now();
                validation.push(self.accuracy(model, task, &self.split.validation)?);
                aside += pause.elapsed().as_secs_f64();
            }
            Ok(())
        })?;
        let seconds = start.elapsed().as_secs_f64() - aside;
        Ok(Run { losses, validation, test: self.accuracy(model, task, &self.split.test)?, seconds })
    }

    /// Trains the base from scratch. Its test accuracies on its own task and on the new one come
    /// with it.
    pub(super) fn base(&self, on_step: &mut dyn FnMut(u64)) -> Result<(Vit, Run, f64)> {
        let mut model = self.model()?;
        let run = self.train(&mut model, Task::Upright, (2e-3, BASE_EPOCHS, 0), on_step)?;
        let new_task = self.accuracy(&model, Task::MirroredNegative, &self.split.test)?;
        Ok((model, run, new_task))
    }

    /// The base with these parameters, in the order of a visit.
    pub(super) fn load(&self, parameters: &[f32]) -> Result<Vit> {
        let mut model = self.model()?;
        let mut rest = parameters;
        let mut state = model.state();
        for (name, _) in model.parameters() {
            let value = &state[&name];
            let (own, others) = rest.split_at_checked(value.numel()).unwrap_or((&[], &[]));
            rest = others;
            let value = Tensor::from_slice(own, value.shape(), &self.device)?;
            state.insert(name, value);
        }
        model.load_state(&state)?;
        Ok(model)
    }

    /// The base made ready for one training: what is frozen is frozen, adapters are attached.
    fn prepared(&self, base: &[f32], vectors: &[TaskVector], method: &Method, seed: u64) -> Result<Vit> {
        let mut model = self.load(base)?;
        if method.name == "probe" {
            model.visit_mut("", &mut |name, item| {
                if let randlora::nn::ItemMut::Parameter(parameter) = item {
                    parameter.set_trainable(name.starts_with(HEAD));
                }
            });
            return Ok(model);
        }
        let settings = Settings {
            rank: Some(method.rank).filter(|&rank| rank > 0),
            scale: method.scale,
            seed,
            steps: Some(self.steps() as usize),
            ..Settings::default()
        };
        let adapter: Box<dyn adapters::Method> = match method.name.strip_prefix("randlora") {
            Some(variant) => Box::new(randlora(variant, method, seed)),
            None if method.name == ATLAS => Box::new(Atlas { vectors: vectors.to_vec() }),
            None => adapters::by_name(method.name, &settings)?,
        };
        adapters::attach(&mut model, &*adapter, &Targets::names(&TARGETS), &[HEAD])?;
        Ok(model)
    }

    /// Chooses the learning rate on the validation split, by the mean of so many trainings for each, then trains once
    /// for each seed.
    pub(super) fn adapt(
        &self,
        base: &[f32],
        method: &Method,
        (learning_rates, choosing): (&[f64], u64),
        on_step: &mut dyn FnMut(u64),
    ) -> Result<Outcome> {
        let vectors = if method.name == ATLAS { self.task_vectors(base, on_step)? } else { vec![] };
        let run = |learning_rate, seed, on_step: &mut dyn FnMut(u64)| -> Result<(Vit, Run)> {
            let mut model = self.prepared(base, &vectors, method, seed)?;
            let run =
                self.train(&mut model, Task::MirroredNegative, (learning_rate, EPOCHS, seed), on_step)?;
            Ok((model, run))
        };
        let mut tried = vec![];
        for &learning_rate in learning_rates {
            let mut sum = 0.0;
            for i in 0..choosing {
                let (_, run) = run(learning_rate, CHOOSING_SEED + i, on_step)?;
                sum += run.validation.last().copied().unwrap_or(0.0);
            }
            tried.push((learning_rate, sum / choosing as f64));
        }
        let best = tried.iter().copied().reduce(|best, next| if next.1 > best.1 { next } else { best });
        let learning_rate = best.map_or(0.0, |(learning_rate, _)| learning_rate);
        let (mut runs, mut trained, mut ranks) = (vec![], 0, None);
        for seed in SEEDS {
            let (model, run) = run(learning_rate, seed, on_step)?;
            trained = model.trainable_count();
            ranks = self.ranks(base, &model)?;
            runs.push(run);
        }
        Ok(Outcome { trained, ranks, tried, learning_rate, runs })
    }

    /// The smallest and largest rank of what was added to the blocks' weights; None if nothing was.
    fn ranks(&self, base: &[f32], model: &Vit) -> Result<Option<(usize, usize)>> {
        let base = self.load(base)?;
        let mut ranks = vec![];
        for ((name, before), (_, after)) in base.linears().into_iter().zip(model.linears()) {
            // HydraLoRA's update depends on the input and has no rank.
            let Ok(delta) = after.delta() else { return Ok(None) };
            let delta = match delta {
                Some(delta) => delta,
                None => after.weight().value().sub(before.weight().value())?,
            };
            if name.contains("encoder") {
                ranks.push(analysis::rank(&delta)?);
            }
        }
        let range = ranks.iter().min().zip(ranks.iter().max()).map(|(&low, &high)| (low, high));
        Ok(range.filter(|&(_, high)| high > 0))
    }
}

/// RandLoRA with PEFT's start, which is the best on this task, or by the automatic scale with the bases that its
/// name goes on with.
fn randlora(variant: &str, method: &Method, seed: u64) -> RandLora {
    let (rank, default) = (method.rank, RandLora::default());
    RandLora {
        rank,
        seed,
        scale: method.scale.unwrap_or(RandLora::balanced_scale(rank)),
        start: if method.scale.is_some() { Start::Peft } else { Start::LikeLora },
        distribution: if variant == "-sparse" { Distribution::SPARSE } else { default.distribution },
        structure: if variant == "-block" { Structure::Block } else { default.structure },
        ..default
    }
}

/// All parameters as numbers, in the order of a visit.
pub(super) fn numbers(model: &Vit) -> Result<Vec<f32>> {
    let mut all = vec![];
    for (_, parameter) in model.parameters() {
        all.extend(parameter.value().to_vec::<f32>()?);
    }
    Ok(all)
}

fn best(scores: &[f32]) -> usize {
    (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0)
}
