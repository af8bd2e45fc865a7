//! From the names of an adapter's modules to the names of the base's tensors.
//!
//! An adapter is named after the model in memory, a checkpoint after what was saved. The two differ
//! by a leading part where one of them is a bare backbone: `model.`, `transformer.`, `bert.`.

use crate::checkpoint::Checkpoint;

/// The one change of names that makes every module of an adapter fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mapping {
    /// The names are the same.
    Same,
    /// The adapter's names begin with this, the base's do not.
    Strip(String),
    /// The base's names begin with this, the adapter's do not.
    Add(String),
}

impl Mapping {
    /// The base tensor for a parameter of a module, or `None` if the module lies elsewhere.
    pub fn apply(&self, module: &str, parameter: &str) -> Option<String> {
        Some(match self {
            Self::Same => format!("{module}.{parameter}"),
            Self::Strip(prefix) => {
                let rest = module.strip_prefix(prefix.as_str())?;
                format!("{rest}.{parameter}")
            }
            Self::Add(prefix) => format!("{prefix}{module}.{parameter}"),
        })
    }

    /// In words, for the plan's notes.
    pub fn describe(&self) -> Option<String> {
        match self {
            Self::Same => None,
            Self::Strip(prefix) => {
                Some(format!("its names begin with {prefix:?}, which the base's do not have"))
            }
            Self::Add(prefix) => {
                Some(format!("the base's names begin with {prefix:?}, which its own do not have"))
            }
        }
    }
}

/// Finds the mapping under which every module has its tensor in the base.
///
/// # Errors
/// The problems in words: the modules that fit nothing under the best mapping, or that more than
/// one mapping fits.
pub fn find_mapping<'a>(
    modules: impl Iterator<Item = &'a str> + Clone,
    parameter: &str,
    base: &Checkpoint,
) -> Result<Mapping, Vec<String>> {
    let fitting = |mapping: &Mapping| {
        let fits = |module: &&str| {
            let name = mapping.apply(module, parameter);
            name.is_some_and(|name| base.tensor(&name).is_some())
        };
        modules.clone().filter(fits).count()
    };
    let total = modules.clone().count();
    let same = fitting(&Mapping::Same);
    if same == total {
        return Ok(Mapping::Same);
    }
    // Only mappings that fit some module can be the best; a module that fits under none is a
    // problem under all. The first module that the names as they stand do not fit is as good as
    // any to learn candidates from, unless it is the odd one out, so all are asked.
    let mut candidates: Vec<(Mapping, usize)> = vec![(Mapping::Same, same)];
    for module in modules.clone() {
        for mapping in candidates_for(module, parameter, base) {
            if !candidates.iter().any(|(known, _)| *known == mapping) {
                let count = fitting(&mapping);
                candidates.push((mapping, count));
            }
        }
        if candidates.iter().any(|(_, count)| *count == total) {
            break;
        }
    }
    let complete: Vec<_> = candidates.iter().filter(|(_, count)| *count == total).collect();
    match complete.as_slice() {
        [(mapping, _)] => Ok(mapping.clone()),
        [_, _, ..] => Err(vec![format!(
            "its modules fit the base in {} ways ({}); give the part of the base that was trained",
            complete.len(),
            complete
                .iter()
                .filter_map(|(mapping, _)| mapping.describe())
                .collect::<Vec<_>>()
                .join(", or ")
        )]),
        [] => {
            // The first of the best: the names as they stand win a tie.
            let best = candidates
                .iter()
                .rev()
                .max_by_key(|(_, count)| *count)
                .map_or(Mapping::Same, |(mapping, _)| mapping.clone());
            Err(modules
                .filter(|module| {
                    let name = best.apply(module, parameter);
                    name.is_none_or(|name| base.tensor(&name).is_none())
                })
                .map(|module| complain(module, parameter, base))
                .collect())
        }
    }
}

/// A leading part that is part of a name, not the place in a list of layers.
fn is_plain(prefix: &str) -> bool {
    !prefix
        .split('.')
        .any(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

fn candidates_for(module: &str, parameter: &str, base: &Checkpoint) -> Vec<Mapping> {
    let mut candidates = Vec::new();
    for (position, _) in module.match_indices('.') {
        let (prefix, rest) = module.split_at(position + 1);
        if is_plain(prefix) && base.tensor(&format!("{rest}.{parameter}")).is_some() {
            candidates.push(Mapping::Strip(prefix.to_owned()));
        }
    }
    let tail = format!(".{module}.{parameter}");
    for name in base.tensors().keys() {
        if let Some(prefix) = name.strip_suffix(&tail).filter(|prefix| is_plain(prefix)) {
            candidates.push(Mapping::Add(format!("{prefix}.")));
        }
    }
    candidates
}

fn complain(module: &str, parameter: &str, base: &Checkpoint) -> String {
    let tied = base
        .config()
        .and_then(|config| config.get("tie_word_embeddings"))
        .and_then(serde_json::Value::as_bool)
        .unwrap_or(false);
    if tied && (module == "lm_head" || module.ends_with(".lm_head")) {
        return format!(
            "its module {module} is tied to the input embeddings in this base, \
             which holds no {module}.{parameter}; a LoRA on it cannot be merged yet"
        );
    }
    let leaf = module.rsplit('.').next().unwrap_or(module);
    let tail = format!(".{leaf}.{parameter}");
    let similar = base.tensors().keys().find(|name| name.ends_with(&tail));
    let hint = match similar {
        Some(name) => format!(" (the base has, for example, {name})"),
        None => format!(" (no tensor of the base ends in {})", &tail[1..]),
    };
    format!("its module {module} fits no tensor of the base{hint}")
}
