//! The keys of `rank_pattern` and `alpha_pattern`, which PEFT holds against every module's path as
//! Python's regular expressions, in one set that takes a bounded number of steps.
//!
//! Three kinds are told apart, and each has the cheapest way that gives the same answer. Names,
//! with dots for any character, are looked up. What a finite automaton can decide is decided by one
//! automaton for all such patterns. The rest (look-around, back-references) is tried one by one by
//! backtracking. All of it draws on one budget, and a pattern that takes more than that is an error:
//! whether it matches is then not known, and a rank that is guessed is a wrong merge.

mod automaton;
mod names;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use fancy_regex::{Regex, RegexBuilder, RuntimeError};

use automaton::Automaton;
use names::Names;

/// Steps for all patterns of a config over all its modules: a few seconds at most. Five thousand
/// patterns over five thousand modules take a hundredth of it.
pub const STEPS: u64 = 500_000_000;
/// The most patterns in one field.
pub const MAXIMUM_PATTERNS: usize = 100_000;
/// How often one match may go back, tried one after the other: most patterns need little, and each
/// attempt is paid for in full.
const BACKTRACKS: [usize; 3] = [500, 10_000, 200_000];
/// Bytes of the automata within a pattern that backtracks.
const DELEGATE_BYTES: usize = 1 << 21;

/// The steps that are left to the patterns of a config.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<AtomicU64>);

impl Default for Budget {
    fn default() -> Self {
        Self::of(STEPS)
    }
}

impl Budget {
    pub fn of(steps: u64) -> Self {
        Self(Arc::new(AtomicU64::new(steps)))
    }

    /// Takes that many steps; whether there were as many.
    fn spend(&self, steps: u64) -> bool {
        let take = |left: u64| left.checked_sub(steps);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

/// Why patterns cannot be compiled or matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// The pattern at that position is no expression, in words.
    Invalid(usize, String),
    /// The pattern at that position took the last of the steps.
    Exceeded(usize),
}

/// Compiled keys in the order of the file.
#[derive(Debug, Clone, Default)]
pub(super) struct Patterns {
    names: Names,
    automaton: Automaton,
    /// The automaton's keys by position, for the paths that it does not take.
    regular: Vec<(usize, OnceLock<Backtracking>)>,
    /// The others by position, in order.
    others: Vec<(usize, Backtracking)>,
    keys: Arc<Vec<String>>,
    budget: Budget,
    /// What was found for a path, which is asked for more than once.
    found: Arc<Mutex<HashMap<String, Option<usize>>>>,
}

impl Patterns {
    /// Compiles all keys.
    pub fn new(keys: Vec<String>, budget: Budget) -> Result<Self, Fault> {
        let mut patterns = Self { keys: Arc::new(keys), budget, ..Self::default() };
        for (position, key) in patterns.keys.clone().iter().enumerate() {
            // Compiling takes time as well.
            if !patterns.budget.spend(20 * key.len() as u64) {
                return Err(Fault::Exceeded(position));
            }
            if patterns.names.add(position, key) {
                continue;
            }
            match patterns.automaton.add(position, key, &patterns.budget) {
                Ok(true) => {
                    patterns.regular.push((position, OnceLock::new()));
                    continue;
                }
                Ok(false) => {}
                Err(automaton::Exceeded) => return Err(Fault::Exceeded(position)),
            }
            let other = Backtracking::new(key, &patterns.budget);
            patterns.others.push((position, other.map_err(|fault| fault.at(position))?));
        }
        Ok(patterns)
    }

    /// The position of the first key that matches a path, as Python's
    /// `re.match(rf"^(.*\.)?({key})$", path)` has it.
    pub fn first_match(&self, path: &str) -> Result<Option<usize>, Fault> {
        if self.keys.is_empty() {
            return Ok(None);
        }
        if let Some(known) = self.found().get(path) {
            return Ok(*known);
        }
        let found = self.search(path)?;
        self.found().insert(path.to_owned(), found);
        Ok(found)
    }

    fn found(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<usize>>> {
        // A panic elsewhere leaves a map that is as good as before.
        self.found.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn search(&self, path: &str) -> Result<Option<usize>, Fault> {
        // The automaton knows bytes, and no line but one.
        let plain = path.is_ascii() && !path.contains('\n');
        let mut first = self.names.first_match(path, &self.budget)?;
        let before = |first: Option<usize>, position: usize| first.is_none_or(|one| position < one);
        if plain {
            let found = self.automaton.first_match(path.as_bytes(), &self.budget)?;
            first = found.filter(|position| before(first, *position)).or(first);
        } else {
            for (position, compiled) in &self.regular {
                if !before(first, *position) {
                    break;
                }
                let pattern = match compiled.get() {
                    Some(pattern) => pattern,
                    None => {
                        let pattern = Backtracking::new(&self.keys[*position], &self.budget)
                            .map_err(|fault| fault.at(*position))?;
                        compiled.get_or_init(|| pattern)
                    }
                };
                if pattern.is_match(path, &self.budget).map_err(|fault| fault.at(*position))? {
                    first = Some(*position);
                }
            }
        }
        for (position, pattern) in &self.others {
            if !before(first, *position) {
                break;
            }
            if pattern.is_match(path, &self.budget).map_err(|fault| fault.at(*position))? {
                first = Some(*position);
            }
        }
        Ok(first)
    }
}

/// A fault of a pattern that does not know its position.
#[derive(Debug)]
enum Trouble {
    Invalid(String),
    Exceeded,
}

impl Trouble {
    fn at(self, position: usize) -> Fault {
        match self {
            Self::Invalid(message) => Fault::Invalid(position, message),
            Self::Exceeded => Fault::Exceeded(position),
        }
    }
}

/// A pattern that is matched by backtracking, with more of it where less was not enough.
#[derive(Debug, Clone)]
struct Backtracking {
    source: String,
    attempts: [OnceLock<Regex>; BACKTRACKS.len()],
}

impl Backtracking {
    fn new(key: &str, budget: &Budget) -> Result<Self, Trouble> {
        if !budget.spend(steps_to_compile(key)) {
            return Err(Trouble::Exceeded);
        }
        // PEFT's own expression, groups included, so that a back-reference in a key counts the
        // same. Python's `$` stands before a last line's end as well, also at the end of a key.
        let key = match key.strip_suffix('$') {
            Some(rest) if !is_escaped(rest) => format!(r"{rest}(?=\n?\z)"),
            _ => key.to_owned(),
        };
        let pattern = Self {
            source: format!(r"^(.*\.)?({key})\n?\z"),
            attempts: [const { OnceLock::new() }; BACKTRACKS.len()],
        };
        pattern.compiled(0)?;
        Ok(pattern)
    }

    fn compiled(&self, attempt: usize) -> Result<&Regex, Trouble> {
        if let Some(regex) = self.attempts[attempt].get() {
            return Ok(regex);
        }
        let regex = RegexBuilder::new(&self.source)
            .backtrack_limit(BACKTRACKS[attempt])
            .delegate_size_limit(DELEGATE_BYTES)
            .build()
            .map_err(|error| Trouble::Invalid(error.to_string()))?;
        Ok(self.attempts[attempt].get_or_init(|| regex))
    }

    fn is_match(&self, path: &str, budget: &Budget) -> Result<bool, Trouble> {
        for (attempt, backtracks) in BACKTRACKS.into_iter().enumerate() {
            // A step back can be followed by a search over all of the path.
            if !budget.spend(backtracks as u64 * (8 + path.len() as u64 / 8)) {
                return Err(Trouble::Exceeded);
            }
            match self.compiled(attempt)?.is_match(path) {
                Ok(found) => return Ok(found),
                Err(fancy_regex::Error::RuntimeError(RuntimeError::BacktrackLimitExceeded)) => {}
                Err(_) => return Err(Trouble::Exceeded),
            }
        }
        Err(Trouble::Exceeded)
    }
}

/// What compiling a key counts as: classes of Unicode characters are large, and counts repeat what
/// they count.
fn steps_to_compile(key: &str) -> u64 {
    let is_class = |pair: &&[u8]| pair[0] == b'\\' && pair[1].is_ascii_alphabetic();
    let classes = key.as_bytes().windows(2).filter(is_class).count() as u64;
    let counts = key.bytes().filter(|byte| *byte == b'{').count() as u64;
    20_000 + 2_000 * key.len() as u64 + 150_000 * classes + 1_500_000 * counts
}

/// Whether the character after this text is escaped by it.
fn is_escaped(text: &str) -> bool {
    text.bytes().rev().take_while(|byte| *byte == b'\\').count() % 2 == 1
}

#[cfg(test)]
mod tests;
