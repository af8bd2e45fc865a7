//! Canonical names of parameters that go by several: on disk and in memory, and in the slices in
//! which one of the two holds what is one tensor in the other.
//!
//! transformers renames, stacks, joins and splits parameters as it loads a checkpoint, each model
//! type by its own list of rules (its `conversion_mapping`). An adapter is named after the model
//! that was in memory, with whichever release; a checkpoint after what was saved. Here every name is
//! brought to a canonical one by the same rules. Two names that become the same are the same
//! parameter, or the same slice of one.

mod families;
mod index;

use std::sync::Arc;

use fancy_regex::{Regex, RegexBuilder, escape};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::canonical::Lie;
pub use crate::checkpoint::names::canonical::{Canonical, SliceIndex};
use crate::checkpoint::names::diffusion::DiffusionNames;
use crate::error::{Error, Result};
use crate::limits;

pub use index::{IndexedTensor, NameIndex};

/// How often a rule may go back while it is held against one name.
const BACKTRACKS: usize = 100_000;
/// What stands in the way of a name that no rule can be held against.
const TOO_LONG: &str = "its name takes too many steps to hold against the rules for its model type";

/// A rule took more steps than it may.
struct Exceeded;

/// What transformers does to some names as it loads a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Rule {
    /// Regular expressions of the names on disk. `*.` stands for an expert's number where the rule
    /// stacks.
    pub sources: Vec<String>,
    /// The names in memory; `\1` stands for the source's group.
    pub targets: Vec<String>,
    /// What makes the tensors in memory of those on disk, in order; none, where only the name
    /// changes.
    #[serde(default)]
    pub operations: Vec<Operation>,
    /// The parts of the model in which the rule holds; anywhere, if there are none. Of several the
    /// first that a name begins with is taken.
    #[serde(default)]
    pub prefixes: Vec<String>,
    /// A rule that regular expressions do not tell in full, by its name.
    #[serde(default)]
    pub special: Option<String>,
}

/// One operation on tensors, as transformers calls it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Operation {
    /// The name of its class.
    pub name: String,
    /// The dimension that it works on.
    #[serde(default)]
    pub dimension: Option<u64>,
    /// Whether it does what its name and dimension say, and nothing besides.
    #[serde(default = "yes")]
    pub plain: bool,
}

fn yes() -> bool {
    true
}

/// The rules of one base, ready for use.
#[derive(Debug, Clone, Default)]
pub struct Renames {
    /// Of a base that is a diffusion model: the names of its parameters.
    diffusion: Option<Arc<DiffusionNames>>,
    renamings: Vec<Renaming>,
    conversions: Vec<Conversion>,
}

#[derive(Debug, Clone)]
struct Pattern {
    regex: Regex,
    prefixes: Vec<String>,
}

#[derive(Debug, Clone)]
struct Renaming {
    source: Pattern,
    target: String,
    obstacle: Option<String>,
}

#[derive(Debug, Clone)]
struct Conversion {
    /// Of each name that is changed the slice that it becomes; none, if it is the whole.
    sources: Vec<(Pattern, Option<SliceIndex>)>,
    target: String,
    obstacle: Option<String>,
}

impl Renames {
    /// The built-in rules for a base: those of its config's model type and of the models within it, or
    /// the names of a diffusion model's components.
    pub fn built_in(base: &Checkpoint) -> Option<Self> {
        if let Some(names) = DiffusionNames::of(base) {
            return Some(Self { diffusion: Some(Arc::new(names)), ..Self::default() });
        }
        let mut types = Vec::new();
        collect_types(base.config()?, &mut types);
        let mut rules = Vec::new();
        for name in types {
            for rule in families::rules(name).unwrap_or_default() {
                if !rules.contains(&rule) {
                    rules.push(rule);
                }
            }
        }
        if rules.is_empty() {
            return None;
        }
        Some(Self::new(&rules).expect("the built-in rules are sound"))
    }

    /// The built-in rules of all families together, for names of which nothing tells the model: all
    /// but those that change leading parts alone.
    pub fn of_all_families() -> Self {
        Self::new(&families::rules_of_all()).expect("the built-in rules are sound")
    }

    /// Rules from outside, as JSON.
    ///
    /// # Errors
    /// [`Error::Argument`] if they are no list of rules.
    pub fn from_json(text: &str) -> Result<Self> {
        let rules: Vec<Rule> = serde_json::from_str(text).map_err(|error| {
            Error::Argument(format!("the renaming rules are not sound: {error}"))
        })?;
        Self::new(&rules)
    }

    fn new(rules: &[Rule]) -> Result<Self> {
        let mut renames = Self::default();
        for rule in rules {
            if rule.operations.is_empty() {
                renames.add_renaming(rule)?;
            } else {
                renames.conversions.push(conversion(rule)?);
            }
        }
        Ok(renames)
    }

    fn add_renaming(&mut self, rule: &Rule) -> Result<()> {
        let obstacle = rule.special.as_ref().map(|name| {
            format!(
                "transformers renames it by {name}, which cannot be followed from its name alone"
            )
        });
        for (position, source) in rule.sources.iter().enumerate() {
            let target = rule.targets.get(position).or(rule.targets.first());
            let Some(target) = target else { return Err(incomplete(rule)) };
            self.renamings.push(Renaming {
                source: pattern(&source.replace("*.", r".*\."), &rule.prefixes)?,
                target: target.clone(),
                obstacle: obstacle.clone(),
            });
        }
        Ok(())
    }

    /// The canonical name of a parameter.
    pub fn canonical(&self, parameter: &str) -> Canonical {
        let mut name = parameter.to_owned();
        let mut obstacle = None;
        if let Some(diffusion) = &self.diffusion
            && let Some(known) = diffusion.canonical(parameter)
        {
            return known.clone();
        }
        let unknown =
            |name| Canonical { obstacle: Some(TOO_LONG.to_owned()), ..Canonical::same(name) };
        for renaming in &self.renamings {
            match renaming.source.replace(&name, &renaming.target) {
                Ok(None) => {}
                Ok(Some((renamed, _))) => {
                    obstacle = obstacle.or_else(|| renaming.obstacle.clone());
                    name = renamed;
                }
                Err(Exceeded) => return unknown(name),
            }
        }
        for conversion in &self.conversions {
            for (source, slice) in &conversion.sources {
                let (renamed, expert) = match source.replace(&name, &conversion.target) {
                    Ok(None) => continue,
                    Ok(Some(found)) => found,
                    Err(Exceeded) => return unknown(name),
                };
                let slice = slice.clone().map(|slice| SliceIndex { expert, ..slice });
                let obstacle = obstacle.or_else(|| conversion.obstacle.clone());
                return Canonical { name: renamed, slice, lie: Lie::Same, obstacle };
            }
        }
        Canonical { obstacle, ..Canonical::same(name) }
    }
}

/// The model types that a config names, outermost first, as many as a model has.
fn collect_types<'a>(config: &'a Map<String, Value>, types: &mut Vec<&'a str>) {
    if types.len() >= limits::MODEL_TYPES {
        return;
    }
    if let Some(name) = config.get("model_type").and_then(Value::as_str)
        && !types.contains(&name)
    {
        types.push(name);
    }
    for inner in config.values().filter_map(Value::as_object) {
        collect_types(inner, types);
    }
}

fn incomplete(rule: &Rule) -> Error {
    Error::Argument(format!("the renaming rule of {:?} has no targets", rule.sources))
}

fn pattern(source: &str, prefixes: &[String]) -> Result<Pattern> {
    // A name ends where its pattern does: `weight` is not the beginning of `weight_scale`. A pattern
    // that ends in an underscore is the beginning of a name.
    let ends_in_word = source.ends_with(|last: char| last.is_ascii_alphanumeric());
    let boundary = if ends_in_word { r"(?!\w)" } else { "" };
    let regex = RegexBuilder::new(&format!("{source}{boundary}"))
        .backtrack_limit(BACKTRACKS)
        .build()
        .map_err(|error| Error::Argument(format!("the renaming rule {source:?}: {error}")))?;
    Ok(Pattern { regex, prefixes: prefixes.to_vec() })
}

impl Pattern {
    /// The name with the first match replaced, and the expert's number in it.
    fn replace(&self, name: &str, target: &str) -> Result<Option<(String, Option<u64>)>, Exceeded> {
        let begins = |prefix: &&String| name.starts_with(prefix.as_str());
        let prefix = match self.prefixes.as_slice() {
            [] => "",
            prefixes => match prefixes.iter().find(begins) {
                Some(prefix) => prefix,
                None => return Ok(None),
            },
        };
        let rest = &name[prefix.len()..];
        // Whether a name matches is not known where the matcher gives up.
        let Some(captures) = self.regex.captures(rest).map_err(|_| Exceeded)? else {
            return Ok(None);
        };
        let Some(whole) = captures.get(0) else { return Ok(None) };
        let expert = captures.name("expert").and_then(|number| number.as_str().parse().ok());
        let group = captures.get(1).map_or("", |group| group.as_str());
        let target = target.replace(r"\1", group).replace(r"\.", ".");
        let (before, after) = (&rest[..whole.start()], &rest[whole.end()..]);
        Ok(Some((format!("{prefix}{before}{target}{after}"), expert)))
    }
}

/// Brings what a rule stacks, joins or splits to whole rows of one tensor.
fn conversion(rule: &Rule) -> Result<Conversion> {
    let plain = rule.operations.iter().all(|operation| operation.plain);
    let operations: Vec<_> =
        rule.operations.iter().map(|one| (one.name.as_str(), one.dimension)).collect();
    let (first, target) = match (rule.sources.first(), rule.targets.first()) {
        (Some(first), Some(target)) => (first, target.clone()),
        _ => return Err(incomplete(rule)),
    };
    let numbered = |source: &String| source.replacen("*.", r"(?<expert>\d+)\.", 1);
    let slots = |count, equal| {
        let alike = if equal { 0..count } else { 0..0 };
        (0..count).map(move |slot| {
            Some(SliceIndex { expert: None, slot, slots: count, alike: alike.clone() })
        })
    };
    let patterns = |sources: Vec<String>, slices: Vec<Option<SliceIndex>>| {
        let patterns = sources.iter().map(|source| pattern(source, &rule.prefixes));
        patterns.zip(slices).map(|(pattern, slice)| Ok((pattern?, slice))).collect::<Result<_>>()
    };
    let count = rule.sources.len();
    let joined = match operations.as_slice() {
        [("MergeModulelist", Some(0))] if count == 1 => true,
        [("MergeModulelist", Some(0)), ("Concatenate", Some(1))] => true,
        [("Concatenate", Some(0))] => !rule.sources.iter().any(|source| source.contains("*.")),
        _ => false,
    };
    if plain && joined && rule.targets.len() == 1 {
        // Which of a model's parts are equal, their rule does not tell; those of experts are.
        let equal = operations[0].0 == "MergeModulelist";
        let sources = rule.sources.iter().map(numbered).collect();
        let slices = slots(count, equal).collect();
        return Ok(Conversion { sources: patterns(sources, slices)?, target, obstacle: None });
    }
    let split = match operations.as_slice() {
        [("Chunk", Some(0))] => Some(true),
        [("Split", Some(0))] => Some(false),
        _ => None,
    };
    if let Some(equal) = split.filter(|_| plain && count == 1) {
        let sources = rule.targets.iter().map(|target| escape(&plain_text(target)).into_owned());
        let slices = slots(rule.targets.len(), equal).collect();
        let sources = patterns(sources.collect(), slices)?;
        return Ok(Conversion { sources, target: plain_text(first), obstacle: None });
    }
    if let [("Transpose", _)] = operations.as_slice()
        && plain_text(first) == plain_text(&target)
    {
        // A change that no name shows; the shapes do.
        return Ok(Conversion { sources: Vec::new(), target, obstacle: None });
    }
    let names: Vec<_> = operations.iter().map(|(name, _)| *name).collect();
    let obstacle = format!(
        "transformers makes it of what is stored by {}, which is no cutting into rows; merge with \
         PEFT",
        names.join(" and ")
    );
    let sources: Vec<_> = rule.sources.iter().map(numbered).collect();
    let targets = rule.targets.iter().map(|target| escape(&plain_text(target)).into_owned());
    let sources: Vec<_> = sources.into_iter().chain(targets).collect();
    let slices = vec![None; sources.len()];
    Ok(Conversion { sources: patterns(sources, slices)?, target, obstacle: Some(obstacle) })
}

/// The name that a pattern stands for, where it stands for one.
fn plain_text(pattern: &str) -> String {
    pattern.trim_start_matches('^').replace(r"\.", ".")
}

#[cfg(test)]
mod tests;
