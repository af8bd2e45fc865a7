//! What the caller decides about a plan: how adapters are combined, and what the output is.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ExpertLayout;
use crate::checkpoint::names::renames::Renames;
use crate::coefficients::{self, Gram};
use crate::entrywise;
use crate::error::{Error, Result};
use crate::methods::{MethodOptions, own_name};
use crate::tensor::dtype::Dtype;
use crate::weights::Weight;

/// How several adapters are combined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Strategy {
    /// Each adapter at its full scale into the result of those before it, rounded once at the end.
    #[default]
    Sequential,
    /// base + Σ wᵢ·(mergedᵢ − base), the weights as given.
    Weighted,
    /// Weighted with 1/N.
    Average,
    /// base + the sum of updates, for every tensor merged element by element by the method of that name.
    Entries(&'static str),
    /// base + Σ cᵢ·(mergedᵢ − base), for every tensor with coefficients that the method of that name finds.
    Gram(&'static str),
}

impl Strategy {
    /// The strategy of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        let own = own_name(name);
        match own {
            "sequential" => return Ok(Self::Sequential),
            "weighted" => return Ok(Self::Weighted),
            "average" => return Ok(Self::Average),
            _ => {}
        }
        if let Some((known, _)) = coefficients::METHODS.iter().find(|(known, _)| *known == own) {
            return Ok(Self::Gram(known));
        }
        if let Some((known, _)) = entrywise::METHODS.iter().find(|(known, _)| *known == own) {
            return Ok(Self::Entries(known));
        }
        let sums = coefficients::METHODS.iter().map(|(name, _)| *name);
        let methods: Vec<&str> =
            sums.chain(entrywise::METHODS.iter().map(|(name, _)| *name)).collect();
        Err(Error::Argument(format!(
            "unknown strategy {name:?}; there are sequential, weighted, average, {}",
            methods.join(", ")
        )))
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Weighted => "weighted",
            Self::Average => "average",
            Self::Entries(name) | Self::Gram(name) => name,
        }
    }
}

impl Serialize for Strategy {
    fn serialize<S: Serializer>(&self, target: S) -> std::result::Result<S::Ok, S::Error> {
        target.serialize_str(self.name())
    }
}

impl Options {
    /// The method that merges element by element, if the strategy is one.
    ///
    /// # Errors
    /// [`Error::Argument`] for options that the strategy does not take, or outside of their domain.
    pub(super) fn entry_method(&self) -> Result<Option<entrywise::Method>> {
        let Strategy::Entries(name) = self.strategy else { return Ok(None) };
        let known = entrywise::METHODS.iter().find(|(known, _)| *known == name);
        let options = &self.strategy_options;
        options.check_known(&self.named(), known.map_or(&[], |(_, options)| options))?;
        let lambda = options.lambda;
        entrywise::Method::new(name, &entrywise::Options { lambda, ..options.entrywise() })
            .map(Some)
    }

    /// The method that finds coefficients, if the strategy is one.
    ///
    /// # Errors
    /// [`Error::Argument`] for what the strategy does not take.
    pub(super) fn gram(&self, count: usize) -> Result<Option<Gram>> {
        let Strategy::Gram(name) = self.strategy else { return Ok(None) };
        let known = coefficients::METHODS.iter().find(|(known, _)| *known == name);
        let options = &self.strategy_options;
        options.check_known(&self.named(), known.map_or(&[], |(_, options)| options))?;
        Gram::new(name, &options.numbers(), count, self.weights.is_some()).map(Some)
    }

    /// The strategy in messages.
    pub(super) fn named(&self) -> String {
        format!("the strategy {}", self.strategy.name())
    }

    /// The factor on the result.
    pub(super) fn lambda(&self) -> f64 {
        self.strategy_options.lambda()
    }

    /// Whether the result depends on the seed.
    pub fn uses_seed(&self) -> bool {
        self.entry_method().is_ok_and(|method| method.is_some_and(|method| method.is_random()))
    }

    /// Checks what the strategy is given, before any work.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub(super) fn check_strategy(&self) -> Result<()> {
        let is_plain = !matches!(self.strategy, Strategy::Entries(_) | Strategy::Gram(_));
        if is_plain && self.strategy_options != MethodOptions::default() {
            return Err(Error::Argument(format!(
                "options were given for the strategy {}, which takes none",
                self.strategy.name()
            )));
        }
        let Some(method) = self.entry_method()? else { return Ok(()) };
        let name = self.strategy.name();
        if self.subtract {
            return Err(Error::Argument(format!(
                "what the strategy {name} adds is no sum of the adapters' own updates, so that it is taken \
                 out with the base alone; {}",
                super::passes::undo::GIVE_THE_BASE
            )));
        }
        if self.compat.is_some() {
            return Err(Error::Argument(format!(
                "PEFT merges the factors of adapters by {name}, not their products, and has no merge into \
                 a base by that name; leave compat out"
            )));
        }
        if self.weights.is_some() && !method.takes_weights() {
            return Err(Error::Argument(format!(
                "the strategy {name} takes no weights: it finds them itself"
            )));
        }
        Ok(())
    }
}

/// How merged weights are computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// In f32 (f64 weights in f64) with one rounding to the output's type.
    #[default]
    Default,
    /// As if by real numbers, rounded once.
    Exact,
}

impl Precision {
    /// The one of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "default" => Ok(Self::Default),
            "exact" => Ok(Self::Exact),
            _ => Err(Error::Argument(format!(
                "unknown precision {name:?}; there are default and exact"
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
    /// What the strategy takes beside weights and a seed.
    pub strategy_options: MethodOptions,
    /// What the random masks of strategies depend on beside names and places.
    pub seed: u64,
    /// One weight an adapter, for strategies that take weights; missing, all are 1.
    pub weights: Option<Vec<Weight>>,
    /// How merged weights are computed.
    #[serde(deserialize_with = "precision")]
    pub precision: Precision,
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

fn precision<'de, D: Deserializer<'de>>(source: D) -> std::result::Result<Precision, D::Error> {
    Precision::from_name(&String::deserialize(source)?).map_err(D::Error::custom)
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
