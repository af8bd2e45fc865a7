//! The change of prefix from the names of an adapter's modules to those of the base's tensors.
//!
//! An adapter is named after the model in memory, a checkpoint after what was saved. The two differ
//! by a leading part where one of them is a bare backbone: `model.`, `transformer.`, `bert.`.

use std::collections::{HashMap, HashSet};

use indexmap::IndexMap;

use crate::checkpoint::heads::{BACKBONE, BACKBONE_OF_ANSWERS};
use crate::checkpoint::names::renames::NameIndex;
use crate::checkpoint::names::towers::{TextTower, TowerFit};
use crate::error::Result;
use crate::limits;
use crate::parallel::task::Task;

/// The one change of names that makes every module of an adapter fit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PrefixChange {
    /// The names are the same.
    Same,
    /// The adapter's names begin with this, the base's do not.
    Strip(String),
    /// The base's names begin with this, the adapter's do not.
    Add(String),
    /// The names of the text tower begin so in the adapter and so in the base; all others are the
    /// same.
    Tower {
        /// In the adapter.
        own: String,
        /// In the base.
        base: String,
        /// The part of the base's config that tells of the tower; none, where it is all of the base.
        config: Option<&'static str>,
    },
}

impl PrefixChange {
    /// The base's name for a parameter of the adapter, or `None` if it lies outside the prefix
    /// that is stripped.
    pub fn apply(&self, parameter: &str) -> Option<String> {
        Some(match self {
            Self::Same => parameter.to_owned(),
            Self::Strip(prefix) => parameter.strip_prefix(prefix.as_str())?.to_owned(),
            Self::Add(prefix) => format!("{prefix}{parameter}"),
            Self::Tower { own, base, .. } => match parameter.strip_prefix(own.as_str()) {
                Some(rest) => format!("{base}{rest}"),
                None => parameter.to_owned(),
            },
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
            Self::Tower { own, base, config: Some(config) } => Some(format!(
                "its names begin with {own:?}, and those of the base's text tower with {base:?}, \
                 which the base's config describes ({config}); it was merged into that tower"
            )),
            Self::Tower { own, base, config: None } if is_of_answers(own, base) => Some(format!(
                "its names begin with {own:?}, and the base's with {base:?}: so one and the same \
                 backbone is called by the class for question answering and by the other classes of \
                 the base's model type"
            )),
            Self::Tower { own, base, config: None } => Some(format!(
                "its names of a text tower begin with {own:?}, and those of the base, which is a \
                 language model alone by its config, with {base:?}"
            )),
        }
    }
}

/// Whether one of two beginnings is that of a class for answers, and the other that of the other
/// classes.
fn is_of_answers(own: &str, base: &str) -> bool {
    [own, base] == [BACKBONE_OF_ANSWERS, BACKBONE] || [own, base] == [BACKBONE, BACKBONE_OF_ANSWERS]
}

/// How an adapter's names fit a base.
#[derive(Debug, Clone)]
pub struct PrefixMatch {
    /// The change that fits most; all of them, where there are no problems.
    pub change: PrefixChange,
    /// In words: the parameters that fit nothing under it, or that there is more than one change.
    pub problems: Vec<String>,
}

/// Finds the change under which every parameter has its tensor in the base. The parameters are
/// given by their canonical names, and with how many elements each has, or none of them with that:
/// of several changes that fit, those count under which the base's have as many.
///
/// # Errors
/// [`crate::Error::Cancelled`].
pub fn find_prefix_change(
    parameters: &[String],
    sizes: &[u64],
    base: &NameIndex<'_>,
    task: &Task,
) -> Result<PrefixMatch> {
    let fits = |change: &PrefixChange, parameter: &String| {
        change.apply(parameter).is_some_and(|name| base.has(&name))
    };
    let same = parameters.iter().filter(|parameter| base.has(parameter)).count();
    if same == parameters.len() {
        return Ok(PrefixMatch { change: PrefixChange::Same, problems: Vec::new() });
    }
    // Each parameter votes for all changes under which it fits.
    let mut votes = IndexMap::<PrefixChange, Votes>::new();
    votes.insert(PrefixChange::Same, Votes { count: same, is_candidate: true });
    for parameter in parameters {
        task.check()?;
        for (change, names_a_module) in changes_of(parameter, base) {
            let votes = votes.entry(change).or_default();
            votes.count += 1;
            votes.is_candidate |= names_a_module;
        }
    }
    let candidates: Vec<(&PrefixChange, usize)> = (votes.iter())
        .filter(|(_, votes)| votes.is_candidate)
        .map(|(change, votes)| (change, votes.count))
        .collect();
    // The first of the best: the names as they stand win a tie.
    let best = candidates.iter().rev().max_by_key(|(_, count)| *count);
    let (change, count) = best
        .map_or((PrefixChange::Same, same), |(best, count)| (PrefixChange::clone(best), *count));
    let is_only = candidates.iter().filter(|(_, other)| *other == count).count() == 1;
    if (count < parameters.len() || !is_only)
        && let Some(tower) = base.text_tower()
        && let Some(fit) = tower.fit(parameters, base)
        && (fit.count > count || fit.count == count && count == parameters.len())
    {
        return match_tower(parameters, base, tower, fit, task);
    }
    let mut equal: Vec<&PrefixChange> = (candidates.iter())
        .filter(|(_, other)| *other == count && count == parameters.len())
        .map(|(change, _)| *change)
        .collect();
    if equal.len() > 1 {
        let fits = |change: &PrefixChange| {
            parameters.iter().zip(sizes).all(|(parameter, size)| {
                let shape = change.apply(parameter).and_then(|name| base.shape(&name));
                shape.is_none_or(|shape| shape.iter().product::<u64>() == *size)
            })
        };
        let of_size: Vec<_> = equal.iter().copied().filter(|change| fits(change)).collect();
        if let [only] = of_size[..] {
            return Ok(PrefixMatch { change: only.clone(), problems: Vec::new() });
        }
        if !of_size.is_empty() {
            equal = of_size;
        }
    }
    let mut hints = Hints { base, known: HashMap::new() };
    let mut problems = Vec::new();
    for parameter in parameters.iter().filter(|parameter| !fits(&change, parameter)) {
        task.check()?;
        problems.push(hints.complain(parameter));
    }
    if equal.len() > 1 {
        problems.push(ambiguity(&equal, base));
    }
    Ok(PrefixMatch { change, problems })
}

/// In words: that an adapter fits in several ways.
fn ambiguity(equal: &[&PrefixChange], base: &NameIndex<'_>) -> String {
    let noun = base.base().noun();
    if base.base().pipeline().is_some() {
        let components = equal.iter().filter_map(|change| match change {
            PrefixChange::Add(prefix) => Some(prefix.split('.').next().unwrap_or_default()),
            _ => None,
        });
        let components: Vec<_> = components.collect();
        if let [first, _, ..] = components[..] {
            return format!(
                "its modules fit {} components of the {noun} by names and shapes ({}); give the \
                 folder of the one that was trained as the {noun}, or begin the adapter's names \
                 with the component ({first}.…)",
                components.len(),
                components.join(", ")
            );
        }
    }
    let ways: Vec<_> = equal.iter().filter_map(|change| change.describe()).collect();
    format!(
        "its modules fit the {noun} in {} ways ({}); give the part of the {noun} that was trained",
        equal.len(),
        ways.join(", or ")
    )
}

/// The names of the text tower that the base has under another prefix.
fn match_tower(
    parameters: &[String],
    base: &NameIndex<'_>,
    tower: &TextTower,
    fit: TowerFit,
    task: &Task,
) -> Result<PrefixMatch> {
    let TowerFit { own, rival, .. } = fit;
    let mut problems = Vec::new();
    if let Some(rival) = rival {
        problems.push(format!(
            "its modules ({own}…) fit the text tower of the {noun} ({}…) and {rival}… as well, by \
             names and shapes; nothing tells which was trained, so rename the adapter's modules to \
             those of the one that was meant",
            tower.prefix,
            noun = base.base().noun()
        ));
    }
    let change = PrefixChange::Tower { own, base: tower.prefix.clone(), config: tower.config };
    let mut hints = Hints { base, known: HashMap::new() };
    for parameter in parameters {
        task.check()?;
        if !change.apply(parameter).is_some_and(|name| base.has(&name)) {
            problems.push(hints.complain(parameter));
        }
    }
    Ok(PrefixMatch { change, problems })
}

/// How many parameters fit under a change, and whether it leaves one of them naming a module and
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

/// The changes under which a parameter fits, each once, and whether what is left of its name under
/// it still names a module and its parameter.
fn changes_of(parameter: &str, base: &NameIndex<'_>) -> Vec<(PrefixChange, bool)> {
    let mut changes = Vec::new();
    for (position, _) in parameter.match_indices('.').take(limits::LEADING_PARTS) {
        let (prefix, rest) = parameter.split_at(position + 1);
        if is_plain(prefix) && base.has(rest) {
            changes.push((PrefixChange::Strip(prefix.to_owned()), rest.contains('.')));
        }
    }
    let tail = format!(".{parameter}");
    let mut seen = HashSet::new();
    for name in base.ending_in(&tail) {
        let prefix = &name[..name.len() - parameter.len()];
        if is_plain(prefix) && seen.insert(prefix) {
            changes.push((PrefixChange::Add(prefix.to_owned()), true));
        }
    }
    changes
}

/// What the base has in place of what it does not have.
struct Hints<'a, 'b> {
    base: &'a NameIndex<'b>,
    /// By the end of a name: the first tensor that has it.
    known: HashMap<String, Option<&'a str>>,
}

impl Hints<'_, '_> {
    fn complain(&mut self, parameter: &str) -> String {
        let base = self.base.base();
        let noun = base.noun();
        let (module, kind) = parameter.rsplit_once('.').unwrap_or((parameter, ""));
        let leaf = module.rsplit('.').next().unwrap_or(module);
        if leaf == "lm_head" && base.ties_embeddings() {
            return format!(
                "its module {module} is tied to the input embeddings in this base, \
                 which holds no {parameter}; a LoRA on it cannot be merged yet"
            );
        }
        let parts = base.pipeline().into_iter().flat_map(|pipeline| &pipeline.parts);
        let mut without = parts.filter(|part| !part.has_tensors);
        if let Some(part) = without.find(|part| parameter.starts_with(&part.prefix())) {
            return format!(
                "its module {module} is of the component {}, which has no weights as safetensors \
                 files; save the pipeline with safe_serialization first",
                part.folder
            );
        }
        let tail = format!(".{leaf}.{kind}");
        let find = || {
            let mut names = base.tensors().keys();
            names.find(|name| name.ends_with(&tail)).map(String::as_str)
        };
        let similar = *self.known.entry(tail.clone()).or_insert_with(find);
        let hint = match similar {
            Some(name) => format!(" (the {noun} has, for example, {name})"),
            None => format!(" (no tensor of the {noun} ends in {})", &tail[1..]),
        };
        format!("its module {module} fits no tensor of the {noun}{hint}")
    }
}
