//! From the names of an adapter's modules to the names of the base's tensors.
//!
//! An adapter is named after the model in memory, a checkpoint after what was saved. The two differ
//! by a leading part where one of them is a bare backbone: `model.`, `transformer.`, `bert.`.

use crate::renames::Names;

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
    /// The base's name for a parameter of the adapter, or `None` if it lies outside the prefix
    /// that is stripped.
    pub fn apply(&self, parameter: &str) -> Option<String> {
        Some(match self {
            Self::Same => parameter.to_owned(),
            Self::Strip(prefix) => parameter.strip_prefix(prefix.as_str())?.to_owned(),
            Self::Add(prefix) => format!("{prefix}{parameter}"),
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

/// How an adapter's names fit a base.
#[derive(Debug, Clone)]
pub struct Fit {
    /// The mapping that fits most; all of them, where there are no problems.
    pub mapping: Mapping,
    /// In words: the parameters that fit nothing under it, or that there is more than one mapping.
    pub problems: Vec<String>,
}

/// Finds the mapping under which every parameter has its tensor in the base. The parameters are
/// given by their canonical names.
pub fn find_mapping(parameters: &[String], base: &Names<'_>) -> Fit {
    let fits = |mapping: &Mapping, parameter: &String| {
        mapping.apply(parameter).is_some_and(|name| base.has(&name))
    };
    let fitting =
        |mapping: &Mapping| parameters.iter().filter(|parameter| fits(mapping, parameter)).count();
    let same = fitting(&Mapping::Same);
    if same == parameters.len() {
        return Fit { mapping: Mapping::Same, problems: Vec::new() };
    }
    // A mapping that fits them all can be learned from any of them; the others are asked only to
    // find the best one that does not.
    let mut candidates: Vec<(Mapping, usize)> = vec![(Mapping::Same, same)];
    for parameter in parameters {
        for mapping in candidates_for(parameter, base) {
            if !candidates.iter().any(|(known, _)| *known == mapping) {
                let count = fitting(&mapping);
                candidates.push((mapping, count));
            }
        }
        if candidates.iter().any(|(_, count)| *count == parameters.len()) {
            break;
        }
    }
    // The first of the best: the names as they stand win a tie.
    let best = candidates.iter().rev().max_by_key(|(_, count)| *count);
    let (mapping, count) = best.cloned().unwrap_or((Mapping::Same, same));
    let mut problems: Vec<_> = parameters
        .iter()
        .filter(|parameter| !fits(&mapping, parameter))
        .map(|parameter| complain(parameter, base))
        .collect();
    let equal: Vec<_> = (candidates.iter())
        .filter(|(_, other)| *other == count && count == parameters.len())
        .filter_map(|(mapping, _)| mapping.describe())
        .collect();
    if equal.len() > 1 {
        problems.push(format!(
            "its modules fit the base in {} ways ({}); give the part of the base that was trained",
            equal.len(),
            equal.join(", or ")
        ));
    }
    Fit { mapping, problems }
}

/// A leading part that is part of a name, not the place in a list of layers.
fn is_plain(prefix: &str) -> bool {
    !prefix
        .split('.')
        .any(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

fn candidates_for(parameter: &str, base: &Names<'_>) -> Vec<Mapping> {
    let mut candidates = Vec::new();
    for (position, _) in parameter.match_indices('.') {
        let (prefix, rest) = parameter.split_at(position + 1);
        // What is left must still name a module and its parameter.
        if rest.contains('.') && is_plain(prefix) && base.has(rest) {
            candidates.push(Mapping::Strip(prefix.to_owned()));
        }
    }
    let tail = format!(".{parameter}");
    for name in base.keys() {
        if let Some(prefix) = name.strip_suffix(&tail).filter(|prefix| is_plain(prefix)) {
            candidates.push(Mapping::Add(format!("{prefix}.")));
        }
    }
    candidates
}

fn complain(parameter: &str, base: &Names<'_>) -> String {
    let (module, kind) = parameter.rsplit_once('.').unwrap_or((parameter, ""));
    let leaf = module.rsplit('.').next().unwrap_or(module);
    if leaf == "lm_head" && base.base().ties_embeddings() {
        return format!(
            "its module {module} is tied to the input embeddings in this base, \
             which holds no {parameter}; a LoRA on it cannot be merged yet"
        );
    }
    let tail = format!(".{leaf}.{kind}");
    let similar = base.base().tensors().keys().find(|name| name.ends_with(&tail));
    let hint = match similar {
        Some(name) => format!(" (the base has, for example, {name})"),
        None => format!(" (no tensor of the base ends in {})", &tail[1..]),
    };
    format!("its module {module} fits no tensor of the base{hint}")
}
