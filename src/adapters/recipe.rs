//! Methods as a file keeps them: settings by their names, as texts, from which the very same are made again.

use std::str::FromStr;

use crate::adapters::{
    AdaLora, Atlas, Dora, HydraLora, Intrinsic, LoraXs, Method, Nola, Pissa, Pranc, Svft, TaskVector, Vera,
};
use crate::error::{Error, Result};

/// The settings of these names as texts. Numbers are written so that reading gives the same bits.
macro_rules! recipe {
    ($settings:expr => $($name:ident),*) => {
        crate::nn::Recipe::from([$((stringify!($name), $settings.$name.to_string())),*])
    };
}
pub(super) use recipe;

/// A method from what [`LinearAdapter::recipe`](crate::nn::LinearAdapter::recipe) says of one of its
/// adapters; `get` gives the text of a name. `vectors`, matrices (out, in) by the layers' names, are what aTLAS's
/// adapters were [given](crate::nn::LinearAdapter::given); other methods take none.
///
/// # Errors
/// [`Error::NoMatch`] for a method that has no recipe; [`Error::Config`] where a setting is missing or no
/// number.
pub fn by_recipe<'a>(
    name: &str,
    get: impl Fn(&str) -> Option<&'a str>,
    vectors: Vec<TaskVector>,
) -> Result<Box<dyn Method>> {
    /// The struct with its fields read by their names.
    macro_rules! read {
        ($Method:ident: $($name:ident),*) => {
            Box::new($Method { $($name: number(stringify!($name), &get)?),* })
        };
    }
    Ok(match name {
        "dora" => read!(Dora: rank, scale, dropout, seed, through_norm),
        "vera" => read!(Vera: rank, d_initial, dropout, seed),
        "pissa" => read!(Pissa: rank, scale, dropout),
        "lora-xs" => read!(LoraXs: rank, scale, dropout, seed),
        "svft" => read!(Svft: band),
        "adalora" => read!(
            AdaLora: rank, first_rank, scale, dropout, seed, steps, warmup, fixed, interval, beta1, beta2,
            orthogonality
        ),
        "hydralora" => read!(HydraLora: rank, heads, scale, dropout, seed),
        "nola" => read!(Nola: rank, coefficients, scale, dropout, seed),
        "pranc" => read!(Pranc: coefficients, scale, dropout, seed),
        "intrinsic" => read!(Intrinsic: coefficients, seed),
        "atlas" => Box::new(Atlas { vectors }),
        _ => {
            let known = [
                "dora",
                "vera",
                "pissa",
                "lora-xs",
                "svft",
                "adalora",
                "hydralora",
                "nola",
                "pranc",
                "intrinsic",
                "atlas",
            ];
            let available = known.map(String::from).to_vec();
            return Err(Error::NoMatch { wanted: format!("the method `{name}`"), available });
        }
    })
}

fn number<'a, T: FromStr>(name: &'static str, get: &impl Fn(&str) -> Option<&'a str>) -> Result<T> {
    let Some(text) = get(name) else { return Err(Error::config(name, "it is missing")) };
    text.parse().map_err(|_| Error::config(name, format!("`{text}` is no such setting")))
}
