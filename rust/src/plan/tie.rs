//! The tied pair: an output head that shares the input embeddings' tensor.

use super::value::Inputs;
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::tensor::safetensors::{TensorInfo, same_bytes};

/// The usual name of the output head.
const HEAD: &str = "lm_head.weight";
/// The names of modules that are output heads with a row for each token.
const HEADS: [&str; 2] = ["lm_head", "embed_out"];
/// The names of input embeddings.
const EMBEDDINGS: [&str; 5] = ["embed_tokens", "wte", "word_embeddings", "embed_in", "shared"];

/// The last part of a weight's module.
fn leaf(parameter: &str) -> Option<&str> {
    parameter.strip_suffix(".weight")?.rsplit('.').next()
}

fn is_input_embedding(parameter: &str) -> bool {
    leaf(parameter).is_some_and(|leaf| EMBEDDINGS.contains(&leaf))
}

/// Whether a parameter is an output head's.
pub(super) fn is_head(parameter: &str) -> bool {
    leaf(parameter).is_some_and(|leaf| HEADS.contains(&leaf))
}

/// Whether a parameter has a row for each token.
pub(super) fn is_of_vocabulary(parameter: &str) -> bool {
    is_head(parameter) || is_input_embedding(parameter)
}

/// The tied pair of a base.
#[derive(Debug, Clone)]
pub(super) struct Tie {
    pub embedding: String,
    pub head: String,
    /// The embeddings' shard and tensor, which are the head's as well.
    pub shard: usize,
    pub tensor: TensorInfo,
    /// Whether the base holds the head's copy too.
    pub stored: bool,
    /// Whether the model has a head at all, whatever the config says of tying it.
    pub has_head: bool,
    /// Whether more than two modules share the tensor.
    pub shared_widely: bool,
}

impl Tie {
    /// The pair, where an adapter changes either of the two.
    ///
    /// # Errors
    /// That the base changed meanwhile, or [`crate::Error::Io`].
    pub fn of(inputs: &Inputs, base: &Checkpoint) -> Result<Option<Self>> {
        let touches = |adapter: &Adapter| {
            let weights =
                adapter.modules().values().map(|module| format!("{}.weight", module.path));
            let saved = adapter.saved().iter().map(|saved| saved.path.clone());
            let rows = adapter.trained_rows().iter().map(|rows| format!("{}.weight", rows.path));
            weights.chain(saved).chain(rows).any(|parameter| is_of_vocabulary(&parameter))
        };
        if !base.ties_embeddings() || !inputs.adapters.iter().any(|adapter| touches(adapter)) {
            return Ok(None);
        }
        let Some(embedding) = find_embedding(base) else { return Ok(None) };
        let location = base.tensors()[&embedding];
        let tensor = base.at(location).clone();
        let stored = base.tensors().keys().find(|name| is_head(name)).cloned();
        let of = |name: &str| {
            let location = base.tensors()[name];
            (&base.shards()[location.shard].file, base.at(location))
        };
        // What the config ties but the files do not is not tied when it is loaded either.
        if let Some(head) = &stored
            && !same_bytes(of(head), of(&embedding))?
        {
            return Ok(None);
        }
        let flag = |name: &str| base.config().and_then(|config| config.get(name)?.as_bool());
        Ok(Some(Self {
            head: stored.clone().unwrap_or_else(|| match leaf(&embedding) {
                Some("embed_in") => "embed_out.weight".to_owned(),
                _ => match embedding.strip_prefix("language_model.") {
                    Some(_) => format!("language_model.{HEAD}"),
                    None => HEAD.to_owned(),
                },
            }),
            shared_widely: flag("is_encoder_decoder") == Some(true)
                || leaf(&embedding) == Some("shared"),
            embedding,
            shard: location.shard,
            tensor,
            has_head: base.is_language_model() || stored.is_some(),
            stored: stored.is_some(),
        }))
    }

    /// The name under which the pair is planned, of a head that the base does not hold.
    pub fn name_of_missing_head(&self, base: &Checkpoint, name: &str) -> Option<String> {
        let is_missing = is_head(name) && base.tensor(name).is_none();
        is_missing.then(|| self.head.clone())
    }

    /// The other name of the pair.
    pub fn other(&self, name: &str) -> Option<&str> {
        match name {
            _ if name == self.embedding => Some(&self.head),
            _ if name == self.head => Some(&self.embedding),
            _ => None,
        }
    }
}

/// The input embeddings: of several, the ones that all others share, or those with as many rows as
/// the config has tokens.
pub(super) fn find_embedding(base: &Checkpoint) -> Option<String> {
    let names = || base.tensors().keys().filter(|name| is_input_embedding(name));
    let tokens = base.config().and_then(|config| {
        let inner = config.get("text_config").and_then(|inner| inner.get("vocab_size"));
        config.get("vocab_size").or(inner)?.as_u64()
    });
    let fits = |name: &&String| {
        tokens.is_some()
            && base.tensor(name).and_then(|tensor| tensor.shape.first()) == tokens.as_ref()
    };
    let shared = names().find(|name| leaf(name) == Some("shared"));
    shared.or_else(|| names().find(fits)).or_else(|| names().next()).cloned()
}
