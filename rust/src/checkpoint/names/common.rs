//! Names of parameters that are common to all ways of loading one model, where no checkpoint tells
//! which of them it has: without the wrappers of trainers, under the names that transformers gives
//! now, without the parts that hold a language model.

use std::collections::HashMap;
use std::sync::LazyLock;

use super::renames::{Canonical, Renames, SliceIndex};
use super::wrappers;

/// Leading parts that hold a language model or all of a model, of which some ways of loading have
/// more than others.
const CONTAINERS: [&str; 5] = ["model", "language_model", "transformer", "backbone", "gpt_neox"];

/// A parameter's name in its forms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommonName {
    /// The name with all of its leading parts.
    pub full: String,
    /// The name without those that hold a language model.
    pub bare: String,
    /// Which slice of that parameter it is; all of it, if none.
    pub slice: Option<SliceIndex>,
}

/// The rules, which take some milliseconds to be made.
static RENAMES: LazyLock<Renames> = LazyLock::new(Renames::of_all_families);

/// The common names of parameters. Adapters of one model ask for the same ones, so that each is
/// found once.
#[derive(Debug, Default)]
pub struct CommonNames {
    known: HashMap<String, CommonName>,
}

impl CommonNames {
    /// The common name of a parameter.
    pub fn of(&mut self, parameter: &str) -> CommonName {
        if let Some(known) = self.known.get(parameter) {
            return known.clone();
        }
        let name = common(parameter);
        self.known.insert(parameter.to_owned(), name.clone());
        name
    }
}

/// The name as it stands.
pub fn as_it_stands(parameter: &str) -> CommonName {
    CommonName { full: parameter.to_owned(), bare: parameter.to_owned(), slice: None }
}

fn common(parameter: &str) -> CommonName {
    let unwrapped = wrappers::strip(parameter);
    let Canonical { name, slice, obstacle, .. } = RENAMES.canonical(&unwrapped);
    // What cannot be followed has its own name.
    let (full, slice) =
        if obstacle.is_none() { (name, slice) } else { (unwrapped.into_owned(), None) };
    CommonName { bare: without_containers(&full).to_owned(), full, slice }
}

/// A parameter's name without leading parts that hold a language model. A module and its parameter
/// are always left.
pub fn without_containers(full: &str) -> &str {
    let mut bare = full;
    while let Some((first, rest)) = bare.split_once('.')
        && CONTAINERS.contains(&first)
        && rest.contains('.')
    {
        bare = rest;
    }
    bare
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_parameter_has_one_name_however_its_model_was_loaded() {
        let q = "layers.0.self_attn.q_proj.weight";
        let moe = "layers.0.mlp.experts.gate_up_proj";
        let (one, all) = (Some((Some(3), 1, 2)), None);
        for (parameter, bare, slice) in [
            ("layers.0.self_attn.q_proj.weight", q, all),
            ("model.layers.0.self_attn.q_proj.weight", q, all),
            ("model.language_model.layers.0.self_attn.q_proj.weight", q, all),
            ("language_model.model.layers.0.self_attn.q_proj.weight", q, all),
            ("_orig_mod.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight", q, all),
            ("language_model.lm_head.weight", "lm_head.weight", all),
            ("model.weight", "model.weight", all),
            ("embed_out.weight", "lm_head.weight", all),
            ("model.layers.0.block_sparse_moe.experts.3.w3.weight", moe, one),
            ("model.layers.0.mlp.experts.3.up_proj.weight", moe, one),
            ("model.layers.0.mlp.experts.gate_up_proj", moe, all),
            ("model.layers.0.block_sparse_moe.gate.weight", "layers.0.mlp.router.weight", all),
            ("layers.0.mlp.gate.weight", "layers.0.mlp.router.weight", all),
            (
                "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
                "vision_tower.encoder.layers.0.mlp.fc1.weight",
                all,
            ),
            (
                "encoder.layer.1.attention.attention.query.weight",
                "layers.1.attention.q_proj.weight",
                all,
            ),
            ("text_model.encoder.layers.0.q.weight", "text_model.encoder.layers.0.q.weight", all),
        ] {
            let name = CommonNames::default().of(parameter);
            assert_eq!(name.bare, bare, "{parameter}");
            let found = name.slice.map(|slice| (slice.expert, slice.slot, slice.slots));
            assert_eq!(found, slice, "{parameter}");
        }
    }
}
