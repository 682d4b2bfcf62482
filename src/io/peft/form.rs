//! How PEFT stores each method, as data: what the tensors of an adapted layer are called and how large they are,
//! what all layers share, and which settings there are.

use crate::adapters::LayerInfo;

/// A side of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// r of the layer.
    Rank,
    /// The size of an input row.
    Inputs,
    /// The size of an output row.
    Outputs,
    /// The smaller of the two.
    Small,
    /// RandLoRA's number of bases, ⌈small/r⌉.
    Bases,
    /// 1.
    One,
}

impl Side {
    /// Its length in a layer.
    pub(super) fn of(self, layer: &LayerInfo, rank: usize) -> usize {
        match self {
            Side::Rank => rank,
            Side::Inputs => layer.inputs,
            Side::Outputs => layer.outputs,
            Side::Small => layer.small(),
            Side::Bases => layer.small().div_ceil(rank),
            Side::One => 1,
        }
    }
}

/// A tensor of an adapted layer.
#[derive(Debug)]
pub(super) struct Part {
    /// The parameter's name in the layer's adapter.
    pub(super) name: &'static str,
    /// The end of its key, after the layer's name.
    pub(super) suffix: &'static str,
    /// Its sides.
    pub(super) sides: &'static [Side],
}

/// What alpha is divided by to give the scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Divisor {
    /// r.
    Rank,
    /// r, or √r where the configuration says `use_rslora`.
    RankOrRoot,
    /// r + 1e-5, as in AdaLoRA, whose ranks may become 0.
    Padded,
}

impl Divisor {
    /// Its value.
    pub(super) fn of(self, rank: usize, rslora: bool) -> f64 {
        match self {
            Divisor::RankOrRoot if rslora => (rank as f64).sqrt(),
            Divisor::Rank | Divisor::RankOrRoot => rank as f64,
            Divisor::Padded => rank as f64 + 1e-5,
        }
    }
}

/// A method as PEFT stores it.
#[derive(Debug)]
pub(super) struct Form {
    /// The method's name here.
    pub(super) method: &'static str,
    /// PEFT's `peft_type`.
    pub(super) kind: &'static str,
    /// A layer's tensors, in the order of its adapter's parameters.
    pub(super) parts: &'static [Part],
    /// The names of the two tensors that all layers share, after `base_model.`, if there are any.
    pub(super) shared: Option<[&'static str; 2]>,
    /// The name of the rank.
    pub(super) rank: &'static str,
    /// The name of alpha, and how the scale follows from it; None for a method without a scale.
    pub(super) alpha: Option<(&'static str, Divisor)>,
    /// The name of the dropout.
    pub(super) dropout: &'static str,
    /// The `bias` that means those of the adapted layers.
    pub(super) biases: &'static str,
    /// Whether layers may have ranks and alphas of their own.
    pub(super) patterns: bool,
    /// The other settings that are read here or change nothing of what is computed, beside [`COMMON`].
    pub(super) settings: &'static [&'static str],
}

/// Settings of every method that are read here or change nothing of what is computed. `fan_in_fan_out` says
/// how the model stores its weights; an adapter's tensors are the same either way.
pub(super) const COMMON: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];

const A: Part = Part { name: "a", suffix: ".lora_A.weight", sides: &[Side::Rank, Side::Inputs] };
const B: Part = Part { name: "b", suffix: ".lora_B.weight", sides: &[Side::Outputs, Side::Rank] };

/// What LoRA and its variants have.
const LORAS: &[&str] = &[
    "alpha_pattern",
    "corda_config",
    "eva_config",
    "init_lora_weights",
    "loftq_config",
    "megatron_core",
    "qalora_group_size",
    "rank_pattern",
    "use_dora",
    "use_rslora",
];

/// RandLoRA.
pub(super) static RANDLORA: Form = Form {
    method: "randlora",
    kind: "RANDLORA",
    parts: &[
        Part { name: "lambda", suffix: ".randlora_lambda", sides: &[Side::Rank, Side::Bases] },
        Part { name: "gamma", suffix: ".randlora_gamma", sides: &[Side::Bases, Side::Small] },
    ],
    shared: Some(["randlora_A", "randlora_B"]),
    rank: "r",
    alpha: Some(("randlora_alpha", Divisor::Rank)),
    dropout: "randlora_dropout",
    biases: "randlora_only",
    patterns: false,
    settings: &["init_weights", "projection_prng_key", "save_projection", "sparse", "very_sparse"],
};

/// LoRA and rsLoRA.
pub(super) static LORA: Form = OF_LORA;

/// DoRA: LoRA with `use_dora`.
pub(super) static DORA: Form = Form {
    method: "dora",
    parts: &[A, B, Part { name: "magnitude", suffix: ".lora_magnitude_vector", sides: &[Side::Outputs] }],
    ..OF_LORA
};

/// PiSSA: LoRA that starts from the weight, `init_lora_weights: "pissa"`.
pub(super) static PISSA: Form = Form { method: "pissa", ..OF_LORA };

/// What the kinds of LoRA have in common.
const OF_LORA: Form = Form {
    method: "lora",
    kind: "LORA",
    parts: &[A, B],
    shared: None,
    rank: "r",
    alpha: Some(("lora_alpha", Divisor::RankOrRoot)),
    dropout: "lora_dropout",
    biases: "lora_only",
    patterns: true,
    settings: LORAS,
};

/// VeRA, which has no scale.
pub(super) static VERA: Form = Form {
    method: "vera",
    kind: "VERA",
    parts: &[
        Part { name: "lambda_b", suffix: ".vera_lambda_b", sides: &[Side::Outputs] },
        Part { name: "lambda_d", suffix: ".vera_lambda_d", sides: &[Side::Rank] },
    ],
    shared: Some(["vera_A", "vera_B"]),
    rank: "r",
    alpha: None,
    dropout: "vera_dropout",
    biases: "vera_only",
    patterns: false,
    settings: &["d_initial", "init_weights", "projection_prng_key", "save_projection"],
};

/// AdaLoRA. PEFT keeps the settings of LoRA that it inherits and does not look at `r`, `use_rslora` and how LoRA
/// starts.
pub(super) static ADALORA: Form = Form {
    method: "adalora",
    kind: "ADALORA",
    parts: &[
        Part { name: "a", suffix: ".lora_A", sides: &[Side::Rank, Side::Inputs] },
        Part { name: "b", suffix: ".lora_B", sides: &[Side::Outputs, Side::Rank] },
        Part { name: "e", suffix: ".lora_E", sides: &[Side::Rank, Side::One] },
    ],
    shared: None,
    rank: "init_r",
    alpha: Some(("lora_alpha", Divisor::Padded)),
    dropout: "lora_dropout",
    biases: "lora_only",
    patterns: false,
    settings: &[
        "beta1",
        "beta2",
        "corda_config",
        "deltaT",
        "eva_config",
        "init_lora_weights",
        "megatron_core",
        "orth_reg_weight",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "use_rslora",
    ],
};

impl Form {
    /// Whether a setting is read here or changes nothing.
    pub(super) fn knows(&self, setting: &str) -> bool {
        let own = [self.rank, self.dropout].into_iter().chain(self.alpha.map(|(name, _)| name));
        COMMON.iter().chain(self.settings).copied().chain(own).any(|name| name == setting)
    }
}
