//! From the names of an adapter's modules to the names of the base's tensors.
//!
//! An adapter is named after the model in memory, a checkpoint after what was saved. The two differ
//! by a leading part where one of them is a bare backbone: `model.`, `transformer.`, `bert.`.

use std::collections::{HashMap, HashSet};

use indexmap::IndexMap;

use crate::checkpoint::names::renames::Names;
use crate::error::Result;
use crate::limits;
use crate::parallel::task::Task;

/// The one change of names that makes every module of an adapter fit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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
///
/// # Errors
/// [`crate::Error::Cancelled`].
pub fn find_mapping(parameters: &[String], base: &Names<'_>, task: &Task) -> Result<Fit> {
    let fits = |mapping: &Mapping, parameter: &String| {
        mapping.apply(parameter).is_some_and(|name| base.has(&name))
    };
    let same = parameters.iter().filter(|parameter| base.has(parameter)).count();
    if same == parameters.len() {
        return Ok(Fit { mapping: Mapping::Same, problems: Vec::new() });
    }
    // Each parameter votes for all mappings under which it fits.
    let mut votes = IndexMap::<Mapping, Votes>::new();
    votes.insert(Mapping::Same, Votes { count: same, is_candidate: true });
    for parameter in parameters {
        task.check()?;
        for (mapping, names_a_module) in mappings_of(parameter, base) {
            let votes = votes.entry(mapping).or_default();
            votes.count += 1;
            votes.is_candidate |= names_a_module;
        }
    }
    let candidates: Vec<(&Mapping, usize)> = (votes.iter())
        .filter(|(_, votes)| votes.is_candidate)
        .map(|(mapping, votes)| (mapping, votes.count))
        .collect();
    // The first of the best: the names as they stand win a tie.
    let best = candidates.iter().rev().max_by_key(|(_, count)| *count);
    let (mapping, count) =
        best.map_or((Mapping::Same, same), |(best, count)| (Mapping::clone(best), *count));
    let mut hints = Hints { base, known: HashMap::new() };
    let mut problems = Vec::new();
    for parameter in parameters.iter().filter(|parameter| !fits(&mapping, parameter)) {
        task.check()?;
        problems.push(hints.complain(parameter));
    }
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
    Ok(Fit { mapping, problems })
}

/// How many parameters fit under a mapping, and whether it leaves one of them naming a module and
/// its parameter, without which it is none.
#[derive(Debug, Default)]
struct Votes {
    count: usize,
    is_candidate: bool,
}

/// A leading part that is part of a name, not the place in a list of layers.
fn is_plain(prefix: &str) -> bool {
    !prefix
        .split('.')
        .any(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The mappings under which a parameter fits, each once, and whether what is left of its name under
/// it still names a module and its parameter.
fn mappings_of(parameter: &str, base: &Names<'_>) -> Vec<(Mapping, bool)> {
    let mut mappings = Vec::new();
    for (position, _) in parameter.match_indices('.').take(limits::LEADING_PARTS) {
        let (prefix, rest) = parameter.split_at(position + 1);
        if is_plain(prefix) && base.has(rest) {
            mappings.push((Mapping::Strip(prefix.to_owned()), rest.contains('.')));
        }
    }
    let tail = format!(".{parameter}");
    let mut seen = HashSet::new();
    for name in base.ending_in(&tail) {
        let prefix = &name[..name.len() - parameter.len()];
        if is_plain(prefix) && seen.insert(prefix) {
            mappings.push((Mapping::Add(prefix.to_owned()), true));
        }
    }
    mappings
}

/// What the base has in place of what it does not have.
struct Hints<'a, 'b> {
    base: &'a Names<'b>,
    /// By the end of a name: the first tensor that has it.
    known: HashMap<String, Option<&'a str>>,
}

impl Hints<'_, '_> {
    fn complain(&mut self, parameter: &str) -> String {
        let base = self.base.base();
        let (module, kind) = parameter.rsplit_once('.').unwrap_or((parameter, ""));
        let leaf = module.rsplit('.').next().unwrap_or(module);
        if leaf == "lm_head" && base.ties_embeddings() {
            return format!(
                "its module {module} is tied to the input embeddings in this base, \
                 which holds no {parameter}; a LoRA on it cannot be merged yet"
            );
        }
        let tail = format!(".{leaf}.{kind}");
        let find = || {
            let mut names = base.tensors().keys();
            names.find(|name| name.ends_with(&tail)).map(String::as_str)
        };
        let similar = *self.known.entry(tail.clone()).or_insert_with(find);
        let hint = match similar {
            Some(name) => format!(" (the base has, for example, {name})"),
            None => format!(" (no tensor of the base ends in {})", &tail[1..]),
        };
        format!("its module {module} fits no tensor of the base{hint}")
    }
}
