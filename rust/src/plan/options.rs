//! What the caller decides about a plan: how adapters are combined, and what the output is.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::ExpertLayout;
use crate::checkpoint::names::renames::Renames;
use crate::error::{Error, Result, agree, counted};
use crate::tensor::dtype::Dtype;

/// How several adapters are combined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Each adapter at its full scale into the result of those before it, rounded once at the end.
    #[default]
    Sequential,
    /// base + Σ wᵢ·(mergedᵢ − base), the weights as given.
    Weighted,
    /// Weighted with 1/N.
    Average,
}

impl Strategy {
    /// The strategy of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "sequential" => Ok(Self::Sequential),
            "weighted" => Ok(Self::Weighted),
            "average" => Ok(Self::Average),
            _ => Err(Error::Argument(format!(
                "unknown strategy {name:?}; there are sequential, weighted and average"
            ))),
        }
    }
}

/// What the caller decides about a plan. As plain data its fields have the names that they have in
/// Python; those that are missing have their defaults, and a name that is unknown is an error.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// How adapters are combined.
    #[serde(deserialize_with = "strategy")]
    pub strategy: Strategy,
    /// One weight an adapter, for [`Strategy::Weighted`]; missing, all are 1.
    pub weights: Option<Vec<f64>>,
    /// The type of the output's floating-point tensors; `None` keeps each as it is.
    #[serde(deserialize_with = "dtype")]
    pub dtype: Option<Dtype>,
    /// Unknown config fields that are known not to matter.
    pub allow: Vec<String>,
    /// Whose result is wanted where PEFT's own merge is not what was trained.
    #[serde(deserialize_with = "compat")]
    pub compat: Option<Compat>,
    /// Whose tokenizer the output has.
    #[serde(deserialize_with = "tokenizer")]
    pub tokenizer: TokenizerChoice,
    /// The base is a merged checkpoint, out of which the adapters are to be taken.
    pub subtract: bool,
    /// How experts' factors lie where neither shapes nor versions tell.
    #[serde(deserialize_with = "expert_layout")]
    pub expert_layout: Option<ExpertLayout>,
    /// The rules by which transformers renames the base's tensors as it loads them; `None` for the
    /// built-in ones.
    #[serde(deserialize_with = "renames")]
    pub renames: Option<Renames>,
}

fn strategy<'de, D: Deserializer<'de>>(source: D) -> std::result::Result<Strategy, D::Error> {
    Strategy::from_name(&String::deserialize(source)?).map_err(D::Error::custom)
}

/// A safetensors name.
fn dtype<'de, D: Deserializer<'de>>(source: D) -> std::result::Result<Option<Dtype>, D::Error> {
    optional(source, |name| Ok(Dtype::from_name(name)))
}

fn compat<'de, D: Deserializer<'de>>(source: D) -> std::result::Result<Option<Compat>, D::Error> {
    optional(source, Compat::from_name)
}

fn tokenizer<'de, D: Deserializer<'de>>(
    source: D,
) -> std::result::Result<TokenizerChoice, D::Error> {
    TokenizerChoice::from_name(&String::deserialize(source)?).map_err(D::Error::custom)
}

fn expert_layout<'de, D: Deserializer<'de>>(
    source: D,
) -> std::result::Result<Option<ExpertLayout>, D::Error> {
    optional(source, ExpertLayout::from_name)
}

fn renames<'de, D: Deserializer<'de>>(source: D) -> std::result::Result<Option<Renames>, D::Error> {
    optional(source, Renames::from_json)
}

/// What a text stands for, if there is one.
fn optional<'de, D: Deserializer<'de>, T>(
    source: D,
    parse: impl FnOnce(&str) -> Result<T>,
) -> std::result::Result<Option<T>, D::Error> {
    let text = Option::<String>::deserialize(source)?;
    text.map(|text| parse(&text)).transpose().map_err(D::Error::custom)
}

/// Whose tokenizer the output of a merge has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TokenizerChoice {
    /// An adapter's where its tokens are not the base's and the merged embeddings have them all.
    #[default]
    Auto,
    /// The base's.
    Base,
    /// The adapter's.
    Adapter,
}

impl TokenizerChoice {
    /// The one of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "base" => Ok(Self::Base),
            "adapter" => Ok(Self::Adapter),
            _ => Err(Error::Argument(format!(
                "unknown tokenizer {name:?}; there are auto, base and adapter"
            ))),
        }
    }
}

/// Another tool whose results are reproduced where they differ from the right ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compat {
    /// `merge_and_unload` of PEFT 0.21.
    Peft,
}

impl Compat {
    /// The one of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "peft" => Ok(Self::Peft),
            _ => Err(Error::Argument(format!("unknown compat {name:?}; there is peft"))),
        }
    }
}

pub(super) fn weights_of(options: &Options, adapters: usize) -> Result<Vec<f64>> {
    if adapters == 0 {
        return Err(Error::Argument("no adapter was given; a merge needs at least one".into()));
    }
    match (options.strategy, &options.weights) {
        (Strategy::Weighted, Some(weights)) => {
            if weights.len() != adapters {
                return Err(Error::Argument(format!(
                    "{} {} given for {}; give as many weights as adapters",
                    counted(weights.len(), "weight"),
                    agree(weights.len(), "was", "were"),
                    counted(adapters, "adapter"),
                )));
            }
            if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
                return Err(Error::Argument(format!("the weight {weight} is not a finite number")));
            }
            Ok(weights.clone())
        }
        (_, Some(_)) => Err(Error::Argument(
            "weights were given, but only the strategy \"weighted\" uses them".into(),
        )),
        (Strategy::Sequential | Strategy::Weighted, None) => Ok(vec![1.0; adapters]),
        (Strategy::Average, None) => Ok(vec![1.0 / adapters as f64; adapters]),
    }
}
