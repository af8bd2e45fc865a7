//! tinker's adapters: PEFT's files, in which some modules have names of their own and experts' factors
//! lie one after the other, those of one side shared.

use std::path::Path;

use indexmap::IndexMap;

use super::peft::Peft;
use crate::adapter::expert_factors::{self, has_rows_in_turn, interleave};
use crate::adapter::format::{Format, Place, WriteOptions};
use crate::adapter::{Adapter, Grammar, Module, TransposedExperts};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::parallel::task::Task;

/// What tinker calls a head.
const HEAD: &str = "unembed_tokens";

/// tinker's format.
#[derive(Debug)]
pub struct Tinker;

impl Format for Tinker {
    fn name(&self) -> &'static str {
        "tinker"
    }

    /// PEFT's, with names that only tinker gives.
    fn detect(&self, place: &Place<'_>) -> Result<bool> {
        if place.source.pickle.is_some() || !Peft.detect(place)? {
            return Ok(false);
        }
        let weights = Peft.weights(place);
        if !place.store.is_file(&weights) {
            return Ok(false);
        }
        // What cannot be read is PEFT's to tell of.
        let Ok(file) = place.open(&weights) else { return Ok(false) };
        Ok(file.header().tensors.iter().any(|tensor| is_mark(&tensor.name, tensor.shape.len())))
    }

    fn weights(&self, place: &Place<'_>) -> String {
        Peft.weights(place)
    }

    fn write(&self, adapter: &Adapter, target: &Path, options: &WriteOptions<'_>) -> Result<()> {
        let mut modules = IndexMap::with_capacity(adapter.modules().len());
        let mut is_of_gpt_oss = has_rows_in_turn(options.base).unwrap_or(false);
        is_of_gpt_oss |= adapter.modules().values().any(|one| one.delta.rows_in_turn().is_some());
        for module in adapter.modules().values() {
            if let Some(parts) = expert_factors::apart(module, ["w1", "w3"]) {
                modules.extend(parts.into_iter().map(|part| (part.key.clone(), part)));
                continue;
            }
            if module.delta.holds_experts() {
                modules.insert(module.key.clone(), module.clone());
                continue;
            }
            let path = own_path(&module.path, is_of_gpt_oss);
            modules.insert(path.clone(), Module { path, ..module.clone() });
        }
        let value = adapter.renamed(
            modules,
            adapter.saved().to_vec(),
            adapter.trained_rows().to_vec(),
            adapter.grammar(),
        );
        Peft.write_stacked(&value.rewritten(), target, options)
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let adapter = Peft.read(place, task)?;
        let has_attention =
            |base: &Checkpoint| base.tensors().keys().any(|name| name.contains(".attn.q_proj."));
        let keeps_attention = place.base.is_some_and(has_attention);
        let mut modules = IndexMap::with_capacity(adapter.modules().len());
        let mut is_of_gpt_oss = false;
        for (key, module) in adapter.modules() {
            let path = match keeps_attention {
                true => with_head(&module.path),
                false => with_attention(&with_head(&module.path)),
            };
            is_of_gpt_oss |= is_of_attention(&module.path) && !keeps_attention;
            modules.insert(key.clone(), Module { path, ..module.clone() });
        }
        // The base tells, and without one its names.
        is_of_gpt_oss = has_rows_in_turn(place.base).unwrap_or(is_of_gpt_oss);
        if is_of_gpt_oss {
            modules = interleave(modules).map_err(|problem| {
                Error::unsupported(place.path(), format!("is tinker's for gpt-oss, and {problem}"))
            })?;
        }
        let mut semantics = adapter.semantics().clone();
        semantics.transposed_experts = Some(TransposedExperts::IfStoredTransposed);
        Ok(adapter.read_as(self.name(), modules, Grammar::Dotted, semantics))
    }
}

/// Whether a tensor has a name that only tinker gives.
fn is_mark(name: &str, dimensions: usize) -> bool {
    let Some((path, _)) = name.split_once(".lora_") else { return false };
    let last = path.rsplit('.').next().unwrap_or(path);
    let is_expert = || path.contains(".experts.w") && dimensions == 3;
    match last {
        HEAD => true,
        "w1" | "w2" | "w3" => is_expert(),
        "in_proj_q" | "in_proj_k" | "in_proj_v" => path.contains(".linear_attn."),
        _ => is_of_attention(path),
    }
}

/// Whether a module is of an attention as tinker calls that of gpt-oss: `layers.0.attn.q_proj`.
fn is_of_attention(path: &str) -> bool {
    let Some((before, last)) = path.rsplit_once(".attn.") else { return false };
    let mut parts = before.rsplit('.');
    let is_number = parts.next().is_some_and(|part| part.parse::<u64>().is_ok());
    is_number
        && parts.next() == Some("layers")
        && ["q_proj", "k_proj", "v_proj", "o_proj"].contains(&last)
}

/// What tinker calls a module.
fn own_path(path: &str, is_of_gpt_oss: bool) -> String {
    if path == "lm_head" {
        return format!("model.{HEAD}");
    }
    let renamed = path.replace(".self_attn.", ".attn.");
    match is_of_gpt_oss && is_of_attention(&renamed) {
        true => renamed,
        false => path.to_owned(),
    }
}

fn with_attention(path: &str) -> String {
    match is_of_attention(path) {
        true => path.replace(".attn.", ".self_attn."),
        false => path.to_owned(),
    }
}

fn with_head(path: &str) -> String {
    match path.strip_suffix(HEAD) {
        Some("" | "model." | "model.language_model." | "language_model.model.") => {
            "lm_head".to_owned()
        }
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tinker_gives_some_names() {
        let at = "base_model.model.model";
        for (name, dimensions, expected) in [
            ("unembed_tokens.lora_A.weight", 2, true),
            ("layers.0.mlp.experts.w1.lora_B.weight", 3, true),
            ("layers.0.block_sparse_moe.experts.3.w1.lora_B.weight", 2, false),
            ("layers.0.linear_attn.in_proj_k.lora_A.weight", 2, true),
            ("layers.0.linear_attn.in_proj_qkv.lora_A.weight", 2, false),
            ("layers.0.attn.q_proj.lora_A.weight", 2, true),
            ("layers.0.self_attn.q_proj.lora_A.weight", 2, false),
            ("h.0.attn.c_attn.lora_A.weight", 2, false),
        ] {
            assert_eq!(is_mark(&format!("{at}.{name}"), dimensions), expected, "{name}");
        }
    }

    #[test]
    fn its_modules_have_other_names_elsewhere() {
        assert_eq!(with_head("model.unembed_tokens"), "lm_head");
        assert_eq!(with_head("model.layers.0.mlp"), "model.layers.0.mlp");
        assert_eq!(with_attention("model.layers.0.attn.q_proj"), "model.layers.0.self_attn.q_proj");
        assert_eq!(with_attention("h.0.attn.c_attn"), "h.0.attn.c_attn");
        for (path, of_gpt_oss, others) in [
            ("lm_head", "model.unembed_tokens", "model.unembed_tokens"),
            (
                "model.layers.0.self_attn.q_proj",
                "model.layers.0.attn.q_proj",
                "model.layers.0.self_attn.q_proj",
            ),
        ] {
            assert_eq!(own_path(path, true), of_gpt_oss);
            assert_eq!(own_path(path, false), others);
        }
    }
}
