//! The text tower of a model of several: where a base's language model lies in it, by its config
//! and its tensors.
//!
//! A language model within a model of images or sounds has its own names there:
//! `model.language_model.layers.0` in place of `model.layers.0`. An adapter of the one fits the other
//! where the config says that it is a language model, and no other tower would fit as well.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::renames::NameIndex;
use crate::checkpoint::heads::{self, BACKBONE, BACKBONE_OF_ANSWERS};
use crate::limits;

/// The parts of configs that describe a language model within another model.
const TEXT_CONFIGS: [&str; 3] = ["text_config", "llm_config", "language_config"];
/// The names of language models within others, by transformers and by models' own code.
const TEXT_TOWERS: [&str; 6] =
    ["language_model", "text_model", "text_decoder", "language", "text_tower", "llm"];
/// What stands in the names of other towers.
const OTHER_TOWERS: [&str; 9] =
    ["vision", "visual", "vit", "image", "video", "audio", "speech", "talker", "pixel"];
/// The names of input embeddings.
const EMBEDDINGS: [&str; 5] =
    ["embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"];

/// Where a base's language model lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextTower {
    /// What its names begin with, the dot included.
    pub prefix: String,
    /// The part of the config that describes it; none, where all of it does.
    pub config: Option<&'static str>,
    /// What its names begin with in other classes of transformers for the base's model type.
    pub in_other_classes: Option<&'static str>,
}

/// An adapter's names for a text tower that the base has under others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TowerFit {
    /// What the adapter's names begin with.
    pub own: String,
    /// How many of the parameters fit.
    pub count: usize,
    /// Another tower of the base whose tensors have the same names and shapes.
    pub rival: Option<String>,
}

impl TextTower {
    /// The text tower of a base; none, if its config does not tell of one, or not which.
    pub fn find(names: &NameIndex<'_>) -> Option<Self> {
        let config = names.base().config()?;
        let inner = TEXT_CONFIGS.into_iter().find_map(|name| {
            config.get(name).and_then(Value::as_object).map(|inner| (name, inner))
        });
        let (part, text) = match inner {
            Some((name, inner)) => (Some(name), inner),
            None => (None, config),
        };
        let mut found = names.keys().filter_map(|name| {
            let embedding = name.strip_suffix(".weight")?;
            let leaf = embedding.rsplit('.').next().filter(|leaf| EMBEDDINGS.contains(leaf))?;
            let prefix = &embedding[..embedding.len() - leaf.len()];
            is_described(names, name, prefix, text).then_some(prefix)
        });
        let prefix = found.next()?;
        let is_alone = found.next().is_none();
        let in_other_classes = match prefix {
            BACKBONE => Some(BACKBONE_OF_ANSWERS),
            BACKBONE_OF_ANSWERS => Some(BACKBONE),
            _ => None,
        };
        is_alone.then(|| Self {
            prefix: prefix.to_owned(),
            config: part,
            in_other_classes: in_other_classes.filter(|_| heads::renames_backbone(config)),
        })
    }

    /// The name in the tower of a parameter, and what its own name has in place of the tower's
    /// prefix.
    pub fn locate<'p>(
        &self,
        parameter: &'p str,
        names: &NameIndex<'_>,
    ) -> Option<(&'p str, String)> {
        let dots = parameter.match_indices('.').take(limits::LEADING_PARTS);
        let cuts = std::iter::once(0).chain(dots.map(|(dot, _)| dot + 1));
        cuts.map(|cut| parameter.split_at(cut)).find_map(|(own, rest)| {
            let name = format!("{}{rest}", self.prefix);
            // The end of a name alone, such as `weight`, names no parameter.
            let fits = rest.contains('.') && self.can_be(own) && names.has(&name);
            fits.then_some((own, name))
        })
    }

    /// Whether names that begin so can be a language model's: of a base of several towers, those that
    /// do not name another; of a base that is nothing else, those that say so, or that another class of
    /// its family gives it.
    fn can_be(&self, own: &str) -> bool {
        if self.in_other_classes == Some(own) {
            return true;
        }
        let mut parts = own.split_terminator('.');
        let names_other = |part: &str| OTHER_TOWERS.iter().any(|other| part.contains(other));
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if parts.clone().any(|part| names_other(part) || is_number(part)) {
            return false;
        }
        self.config.is_some() || parts.any(|part| TEXT_TOWERS.contains(&part))
    }

    /// How parameters fit the tower under the beginning that most of their names have in its place.
    pub fn fit(&self, parameters: &[String], names: &NameIndex<'_>) -> Option<TowerFit> {
        let own = parameters.iter().find_map(|parameter| self.locate(parameter, names))?.0;
        if own == self.prefix {
            return None;
        }
        let in_tower = |parameter: &String| {
            let rest = parameter.strip_prefix(own)?;
            Some((rest.to_owned(), format!("{}{rest}", self.prefix)))
                .filter(|(_, name)| names.has(name))
        };
        let inside: Vec<_> = parameters.iter().filter_map(in_tower).collect();
        let beside = parameters
            .iter()
            .filter(|parameter| in_tower(parameter).is_none() && names.has(parameter))
            .count();
        Some(TowerFit {
            own: own.to_owned(),
            count: inside.len() + beside,
            rival: self.rival(&inside, names),
        })
    }

    /// Another beginning under which the base has all of the same, in the same shapes.
    fn rival(&self, inside: &[(String, String)], names: &NameIndex<'_>) -> Option<String> {
        let (first, _) = inside.first()?;
        let tail = format!(".{first}");
        let others = names.ending_in(&tail).map(|name| &name[..name.len() - first.len()]);
        let mut others = others.filter(|other| *other != self.prefix);
        let is_alike = |other: &&str| {
            inside.iter().all(|(rest, name)| {
                let twin = format!("{other}{rest}");
                names.has(&twin) && names.shape(&twin) == names.shape(name)
            })
        };
        others.find(is_alike).map(str::to_owned)
    }
}

/// Whether what a config says of a language model holds for the tensors under a prefix that have
/// those input embeddings.
fn is_described(
    names: &NameIndex<'_>,
    embedding: &str,
    prefix: &str,
    config: &Map<String, Value>,
) -> bool {
    let number = |fields: &[&str]| {
        fields.iter().find_map(|field| config.get(*field).and_then(Value::as_u64))
    };
    let Some(shape) = names.shape(embedding) else { return false };
    let [rows, width] = shape[..] else { return false };
    let layers = || {
        let inner = names.keys().filter_map(|name| name.strip_prefix(prefix));
        let numbers = inner.filter_map(|name| name.split('.').nth(1)?.parse::<u64>().ok());
        numbers.collect::<HashSet<_>>().len() as u64
    };
    let said_width = number(&["hidden_size", "n_embd", "d_model", "dim"]);
    let said_layers = number(&["num_hidden_layers", "n_layer", "num_layers"]);
    // The rows can be more than the tokens, for there is padding, and tokens that were added.
    number(&["vocab_size"]).is_none_or(|tokens| tokens <= rows)
        && said_width.is_none_or(|said| said == width)
        && said_layers.is_none_or(|said| said <= layers())
}
