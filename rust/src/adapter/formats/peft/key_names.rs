//! The grammar of an adapter's keys: which module or parameter a key names, which part of it, and
//! what PEFT, a training tool or a state dict puts into the name beside that.

use indexmap::{IndexMap, IndexSet};

use crate::adapter::Role;
use crate::checkpoint::names::wrappers::{self, Wrappers, is_wrapper};

/// PEFT's wrapper around the user's model; not part of any module's name.
const PREFIX: [&str; 2] = ["base_model", "model"];
/// The adapter's name where nobody gave it another.
const DEFAULT: &str = "default";

/// A module's part in a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
    EmbeddingA,
    EmbeddingB,
    Magnitude,
    Bias,
    Diagonal,
}

/// A path of the model that was trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NamedPath {
    /// Without what tools put into it.
    pub path: String,
    /// With that.
    pub written: String,
}

impl NamedPath {
    /// Of a parameter of the module.
    pub fn parameter(&self, name: &str) -> Self {
        let of = |path: &str| format!("{path}.{name}");
        Self { path: of(&self.path), written: of(&self.written) }
    }
}

/// What a key of the file names.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A part of a module, which its own key tells from all others.
    Module {
        key: String,
        path: NamedPath,
        part: Part,
    },
    Rows(NamedPath),
    Saved(NamedPath),
    Other(Role),
}

/// The keys of a module's A, B, magnitude and bias, as PEFT saves them.
pub(super) fn names_of(path: &str, embedding: bool) -> [String; 4] {
    let endings = match embedding {
        true => {
            [".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector", ".lora_B.bias"]
        }
        false => [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_B.bias"],
    };
    endings.map(|ending| name_of(path, ending))
}

/// What the key of trained rows ends with.
pub(super) const ROWS: &str = ".token_adapter.trainable_tokens_delta";

/// The key of a module's part, which ends so.
pub(super) fn name_of(path: &str, ending: &str) -> String {
    format!("{}.{path}{ending}", PREFIX.join("."))
}

/// The key of a parameter that was trained whole, as PEFT saves it.
pub(super) fn saved_name(path: &str) -> String {
    format!("{}.{path}", PREFIX.join("."))
}

/// Reads the keys of one file, and remembers what it left out of them.
pub(super) struct KeyReader<'a> {
    wrappers: Wrappers<'a>,
    /// The adapter's name in the keys, with the first that has it. A file that PEFT saved leaves it
    /// out, a state dict has it.
    adapter: Option<(String, String)>,
    /// The parts of names that tools put there.
    left_out: IndexSet<String>,
}

impl<'a> KeyReader<'a> {
    /// For a file of those keys.
    ///
    /// # Errors
    /// In words, if the file holds more than one adapter.
    pub fn new<'k>(
        wrappers: Wrappers<'a>,
        keys: impl Iterator<Item = &'k str>,
    ) -> Result<Self, String> {
        let mut named = IndexMap::<&str, &str>::new();
        let mut saved_by = IndexMap::<&str, &str>::new();
        let mut unnamed = None;
        for key in keys {
            let parts: Vec<_> = key.split('.').collect();
            if let Some(factor) = Factor::find(&parts) {
                match factor.adapter {
                    Some(adapter) => {
                        named.entry(adapter).or_insert(key);
                    }
                    None if factor.part != Part::Magnitude => {
                        unnamed.get_or_insert(key);
                    }
                    None => {}
                }
            } else if let Some((_, Some(adapter))) = trained_rows(&parts) {
                named.entry(adapter).or_insert(key);
            } else if let Some(adapter) = saver(&parts) {
                saved_by.entry(adapter).or_insert(key);
            }
        }
        // Without a name in the keys of factors, it is a part of the module that was saved.
        let are_adapters = saved_by.contains_key(DEFAULT)
            || named.first().is_some_and(|(adapter, _)| *adapter != DEFAULT);
        for (adapter, key) in saved_by.into_iter().filter(|_| are_adapters) {
            named.entry(adapter).or_insert(key);
        }
        let adapter =
            named.first().map(|(adapter, key)| ((*adapter).to_owned(), (*key).to_owned()));
        // Files made by hand have the usual name in some of their keys and not in others.
        let unnamed = unnamed.filter(|_| named.keys().any(|adapter| *adapter != DEFAULT));
        if named.len() + usize::from(unnamed.is_some()) > 1 {
            let all = named.iter().map(|(adapter, key)| format!("{adapter} ({key})"));
            let all: Vec<_> =
                all.chain(unnamed.map(|key| format!("one without a name ({key})"))).collect();
            return Err(format!(
                "holds the tensors of {} adapters: {}; save each in a folder of its own \
                 (model.save_pretrained(folder, selected_adapters=[name])) and give that",
                all.len(),
                all.join(" and ")
            ));
        }
        Ok(Self { wrappers, adapter, left_out: IndexSet::new() })
    }

    /// What a key names.
    pub fn read(&mut self, key: &str) -> Key {
        let all: Vec<_> = key.split('.').collect();
        let (front, parts) = all.split_at(prefix_length(&all));
        self.leave_out(front.iter().filter(|part| is_wrapper(part)));
        if let Some(factor) = Factor::find(parts) {
            let (module, rest) = parts.split_at(factor.position);
            self.leave_out(rest.iter().filter(|part| is_wrapper(part)));
            let path = self.path(module);
            let module = module.join(".");
            let key = match path.path == wrappers::strip(&path.written) {
                true => wrappers::strip(&module).into_owned(),
                false => module,
            };
            return Key::Module { key, path, part: factor.part };
        }
        if let Some((position, _)) = trained_rows(parts) {
            return Key::Rows(self.path(&parts[..position]));
        }
        let is_leftover =
            |part: &&str| TRAINING_ONLY.iter().any(|leftover| part.contains(leftover));
        if parts.iter().any(is_leftover)
            || parts.split_last().is_some_and(|(_, path)| path.contains(&"original_module"))
        {
            return Key::Other(Role::TrainingOnly);
        }
        Key::Saved(self.path(parts))
    }

    /// In words: what was left out of the names.
    pub fn notes(&self) -> Vec<String> {
        let adapter = self.adapter.as_ref().filter(|(adapter, _)| adapter != DEFAULT);
        let adapter = adapter.map(|(adapter, key)| {
            format!(
                "its keys have the adapter's name, {adapter}, as a state dict does ({key}); it was \
                 left out"
            )
        });
        let tools: Vec<_> = (self.left_out.iter())
            .map(|part| format!("{part} ({})", wrappers::tool_of(part)))
            .collect();
        let tools = (!tools.is_empty()).then(|| {
            format!(
                "its names have {}, which training tools put around a model's modules; it was left \
                 out",
                tools.join(" and ")
            )
        });
        adapter.into_iter().chain(tools).collect()
    }

    fn leave_out<'p>(&mut self, parts: impl Iterator<Item = &'p &'p str>) {
        for part in parts {
            if !self.left_out.contains(*part) {
                self.left_out.insert((*part).to_owned());
            }
        }
    }

    /// The path in the model of what has those parts in a key.
    fn path(&mut self, parts: &[&str]) -> NamedPath {
        let saver = self.adapter.as_ref().map_or(DEFAULT, |(adapter, _)| adapter);
        let written = without_peft(parts, saver);
        let path = self.wrappers.strip(&written).into_owned();
        if path != written {
            let count = |path: &str, part: &str| path.split('.').filter(|one| *one == part).count();
            let is_gone = |part: &&&str| count(&path, part) < count(&written, part);
            self.leave_out(parts.iter().filter(|part| is_wrapper(part)).filter(is_gone));
        }
        NamedPath { path, written }
    }
}

/// Keys with such a part are left over from training; PEFT's merge ignores them as well.
const TRAINING_ONLY: [&str; 2] = ["lora_velora_embed", "lora_monteclora_sampler"];

/// How many of a key's parts stand before the model's own: PEFT's, and what tools put around it.
fn prefix_length(parts: &[&str]) -> usize {
    let mut own = parts.iter().enumerate().filter(|(_, part)| !is_wrapper(part));
    let mut is_next = |expected: &str| own.next().filter(|(_, part)| **part == expected);
    match is_next(PREFIX[0]).and_then(|_| is_next(PREFIX[1])) {
        Some((position, _)) => position + 1,
        None => 0,
    }
}

/// What a key of a factor says besides its module.
struct Factor<'k> {
    /// How many parts of the key are the module's.
    position: usize,
    part: Part,
    /// The adapter's name, where it stands in the key.
    adapter: Option<&'k str>,
}

impl<'k> Factor<'k> {
    /// Reads the end of a key: the kind of factor, maybe the adapter's name, and the parameter.
    fn find(parts: &[&'k str]) -> Option<Self> {
        let kinds = [
            "lora_A",
            "lora_B",
            "lora_embedding_A",
            "lora_embedding_B",
            "lora_magnitude_vector",
            "lora_diag",
        ];
        let position = parts.iter().rposition(|part| kinds.contains(part))?;
        if position == 0 {
            return None;
        }
        let end: Vec<_> =
            parts[position + 1..].iter().copied().filter(|part| !is_wrapper(part)).collect();
        let (part, adapter) = match (parts[position], end.as_slice()) {
            ("lora_A", [] | ["weight"]) => (Part::A, None),
            ("lora_A", [adapter, "weight"]) => (Part::A, Some(*adapter)),
            ("lora_B", [] | ["weight"]) => (Part::B, None),
            ("lora_B", [adapter, "weight"]) => (Part::B, Some(*adapter)),
            ("lora_B", ["bias"]) => (Part::Bias, None),
            ("lora_B", [adapter, "bias"]) => (Part::Bias, Some(*adapter)),
            ("lora_embedding_A", []) => (Part::EmbeddingA, None),
            ("lora_embedding_A", [adapter]) => (Part::EmbeddingA, Some(*adapter)),
            ("lora_embedding_B", []) => (Part::EmbeddingB, None),
            ("lora_embedding_B", [adapter]) => (Part::EmbeddingB, Some(*adapter)),
            ("lora_magnitude_vector", [] | ["weight"]) => (Part::Magnitude, None),
            ("lora_magnitude_vector", [adapter] | [adapter, "weight"]) => {
                (Part::Magnitude, Some(*adapter))
            }
            ("lora_diag", []) => (Part::Diagonal, None),
            ("lora_diag", [adapter]) => (Part::Diagonal, Some(*adapter)),
            _ => return None,
        };
        Some(Self { position, part, adapter })
    }
}

/// The end of a key of trained rows: how many parts are the module's, and the adapter's name, where
/// it stands there.
fn trained_rows<'k>(parts: &[&'k str]) -> Option<(usize, Option<&'k str>)> {
    let own = parts.iter().rposition(|part| *part == "trainable_tokens_delta")?;
    let position = parts[..own].iter().rposition(|part| !is_wrapper(part))?;
    let end: Vec<_> = parts[own + 1..].iter().copied().filter(|part| !is_wrapper(part)).collect();
    match (parts[position], end.as_slice()) {
        ("token_adapter", []) => Some((position, None)),
        ("token_adapter", [adapter]) => Some((position, Some(*adapter))),
        _ => None,
    }
}

/// What stands after `modules_to_save`, before the parameter: the adapter's name, or a part of the
/// module.
fn saver<'k>(parts: &[&'k str]) -> Option<&'k str> {
    let position = parts.iter().position(|part| *part == "modules_to_save")?;
    let mut after = parts[position + 1..].iter().filter(|part| !is_wrapper(part));
    after.next().copied().filter(|_| after.next().is_some())
}

/// A path without the wrappers that PEFT puts around modules, and without the adapter's name after
/// them; they are not part of the model's own names.
fn without_peft(parts: &[&str], adapter: &str) -> String {
    let wrappers = ["base_layer", "modules_to_save", "token_adapter"];
    let mut kept: Vec<&str> = Vec::new();
    let mut follows = false;
    for part in parts {
        if follows && (*part == adapter || *part == DEFAULT) {
            follows = false;
            continue;
        }
        follows = *part == "modules_to_save" || follows && is_wrapper(part);
        if !wrappers.contains(part) {
            kept.push(part);
        }
    }
    kept.join(".")
}
