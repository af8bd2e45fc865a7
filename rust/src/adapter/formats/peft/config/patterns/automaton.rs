//! One automaton for all keys that are regular: it reads a path from its end, where keys differ
//! soon, and its sets of nodes are found once and kept.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use regex_syntax::ParserBuilder;
use regex_syntax::hir::{Class, Hir, HirKind, Look};

use super::{Budget, Fault};

/// The most nodes that one key may come to once its counts are written out.
const NODES_OF_KEY: usize = 1 << 16;
/// The most nodes that are kept in sets; beyond, all sets are found again.
const NODES_IN_SETS: usize = 1 << 22;
/// Steps that a node takes to be made; the budget bounds their memory so.
const STEPS_OF_NODE: u64 = 200;

/// The budget has come to its end.
#[derive(Debug)]
pub(super) struct Exceeded;

/// A node of the nondeterministic automaton. It reads backwards.
#[derive(Debug, Clone)]
enum Node {
    /// Takes a byte of these ranges.
    Bytes(Box<[(u8, u8)]>, u32),
    /// Goes on at either.
    Either(u32, u32),
    /// Goes on at the beginning of the path only.
    Beginning(u32),
    /// Goes on at the end of the path only.
    End(u32),
    /// The key at that position matches.
    Match(usize),
    /// Goes nowhere.
    Nowhere,
}

/// The keys that are regular.
#[derive(Debug, Default)]
pub(super) struct Automaton {
    nodes: Vec<Node>,
    /// Where each key begins: its position, its first node, and the node where it is entered.
    keys: Vec<(usize, usize, u32)>,
    sets: Mutex<Sets>,
}

impl Clone for Automaton {
    fn clone(&self) -> Self {
        Self { nodes: self.nodes.clone(), keys: self.keys.clone(), sets: Mutex::default() }
    }
}

/// Sets of nodes that were met, and where each byte leads from them.
#[derive(Debug, Default)]
struct Sets {
    known: HashMap<Box<[u32]>, u32>,
    all: Vec<Box<[u32]>>,
    next: HashMap<(u32, u8), u32>,
    /// What matches at the beginning of the path.
    found: HashMap<u32, Option<usize>>,
    /// Nodes in all sets together.
    nodes: usize,
    /// For each node the round in which it was last seen, so that none is gone through twice.
    seen: Vec<u32>,
    round: u32,
}

impl Automaton {
    /// Adds a key, if it is one that is read here as `fancy_regex` and Python read it.
    pub fn add(&mut self, position: usize, key: &str, budget: &Budget) -> Result<bool, Exceeded> {
        if !is_common(key) {
            return Ok(false);
        }
        // Paths are of ASCII here, so that classes can be of bytes.
        let parsed = ParserBuilder::new().unicode(false).utf8(false).build().parse(key);
        let Ok(parsed) = parsed else { return Ok(false) };
        let begin = self.nodes.len();
        match self.build_key(position, &parsed, budget) {
            Ok(entry) => {
                self.keys.push((position, begin, entry));
                Ok(true)
            }
            Err(Obstacle::Exceeded) => Err(Exceeded),
            Err(Obstacle::Foreign) => {
                self.nodes.truncate(begin);
                Ok(false)
            }
        }
    }

    /// The position of the first key that matches a path of ASCII in one line.
    pub fn first_match(&self, path: &[u8], budget: &Budget) -> Result<Option<usize>, Fault> {
        if self.keys.is_empty() {
            return Ok(None);
        }
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        sets.seen.resize(self.nodes.len(), 0);
        if sets.all.is_empty() {
            self.start(&mut sets, budget)?;
        }
        let mut set = 0;
        for byte in path.iter().rev() {
            if !budget.spend(1) {
                return Err(self.fault(&sets.all[set as usize]));
            }
            set = match sets.next.get(&(set, *byte)) {
                Some(next) => *next,
                None => self.step(&mut sets, set, *byte, budget)?,
            };
            if sets.all[set as usize].is_empty() {
                return Ok(None);
            }
        }
        if let Some(found) = sets.found.get(&set) {
            return Ok(*found);
        }
        let nodes = sets.all[set as usize].clone();
        // A path of no characters ends where it begins.
        let at = Place { beginning: true, end: path.is_empty() };
        let entries = self.keys.iter().map(|(_, _, entry)| *entry);
        let begin: Vec<u32> = if at.end { entries.collect() } else { nodes.to_vec() };
        let closed = self.close(&mut sets, &begin, at, budget)?;
        let matches = closed.iter().filter_map(|node| match self.nodes[*node as usize] {
            Node::Match(position) => Some(position),
            _ => None,
        });
        let found = matches.min();
        if !at.end {
            sets.found.insert(set, found);
        }
        Ok(found)
    }

    fn start(&self, sets: &mut Sets, budget: &Budget) -> Result<(), Fault> {
        let entries: Vec<u32> = self.keys.iter().map(|(_, _, entry)| *entry).collect();
        let closed = self.close(sets, &entries, Place { beginning: false, end: true }, budget)?;
        sets.intern(closed);
        Ok(())
    }

    /// The set to which a byte leads, which is kept.
    fn step(&self, sets: &mut Sets, set: u32, byte: u8, budget: &Budget) -> Result<u32, Fault> {
        let nodes = sets.all[set as usize].clone();
        if !budget.spend(nodes.len() as u64) {
            return Err(self.fault(&nodes));
        }
        let takes = |node: &u32| match &self.nodes[*node as usize] {
            Node::Bytes(ranges, next) => {
                let holds = |(low, high): &(u8, u8)| (*low..=*high).contains(&byte);
                ranges.iter().any(holds).then_some(*next)
            }
            _ => None,
        };
        let next: Vec<u32> = nodes.iter().filter_map(takes).collect();
        let inside = Place { beginning: false, end: false };
        let closed = self.close(sets, &next, inside, budget)?;
        if sets.nodes > NODES_IN_SETS {
            let (seen, round) = (std::mem::take(&mut sets.seen), sets.round);
            *sets = Sets { seen, round, ..Sets::default() };
            self.start(sets, budget)?;
            return Ok(sets.intern(closed));
        }
        let next = sets.intern(closed);
        sets.next.insert((set, byte), next);
        Ok(next)
    }

    /// All nodes that can be reached without a byte, of which those that wait for one, for the
    /// beginning, or match are kept.
    fn close(
        &self,
        sets: &mut Sets,
        begin: &[u32],
        at: Place,
        budget: &Budget,
    ) -> Result<Box<[u32]>, Fault> {
        sets.round += 1;
        let round = sets.round;
        let mut waiting = begin.to_vec();
        let mut kept = Vec::new();
        let mut steps = 0;
        while let Some(node) = waiting.pop() {
            if std::mem::replace(&mut sets.seen[node as usize], round) == round {
                continue;
            }
            steps += 1;
            match &self.nodes[node as usize] {
                Node::Either(left, right) => waiting.extend([*left, *right]),
                Node::Beginning(next) if at.beginning => waiting.push(*next),
                Node::End(next) if at.end => waiting.push(*next),
                Node::End(_) | Node::Nowhere => {}
                Node::Bytes(..) | Node::Beginning(_) | Node::Match(_) => kept.push(node),
            }
        }
        if !budget.spend(steps) {
            return Err(self.fault(if kept.is_empty() { begin } else { &kept }));
        }
        kept.sort_unstable();
        Ok(kept.into())
    }

    /// The end of the budget, by the key that has most of these nodes.
    fn fault(&self, nodes: &[u32]) -> Fault {
        let mut counts = HashMap::<usize, usize>::new();
        for node in nodes {
            let key = self.keys.partition_point(|(_, begin, _)| *begin <= *node as usize);
            *counts.entry(key.saturating_sub(1)).or_default() += 1;
        }
        // Of several the first, whatever the map's order.
        let most = counts.into_iter().max_by_key(|(key, count)| (*count, std::cmp::Reverse(*key)));
        Fault::Exceeded(self.keys[most.map_or(0, |(key, _)| key)].0)
    }

    fn build_key(&mut self, position: usize, key: &Hir, budget: &Budget) -> Result<u32, Obstacle> {
        let mut builder = Builder { nodes: &mut self.nodes, left: NODES_OF_KEY, budget };
        // Before a key stands nothing, or anything that ends in a dot and is of one line.
        let matched = builder.add(Node::Match(position))?;
        let beginning = builder.add(Node::Beginning(matched))?;
        let again = builder.add(Node::Nowhere)?;
        let others = [(0, b'\n' - 1), (b'\n' + 1, u8::MAX)];
        let other = builder.add(Node::Bytes(others.into(), again))?;
        builder.nodes[again as usize] = Node::Either(other, beginning);
        let dot = builder.add(Node::Bytes([(b'.', b'.')].into(), again))?;
        let before = builder.add(Node::Either(dot, beginning))?;
        builder.build(key, before)
    }
}

/// Where in a path the automaton stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    beginning: bool,
    end: bool,
}

impl Sets {
    fn intern(&mut self, set: Box<[u32]>) -> u32 {
        if let Some(known) = self.known.get(&set) {
            return *known;
        }
        let number = self.all.len() as u32;
        self.nodes += set.len() + 1;
        self.known.insert(set.clone(), number);
        self.all.push(set);
        number
    }
}

/// Why a key is not made into nodes.
enum Obstacle {
    Exceeded,
    /// It is for the backtracking matcher.
    Foreign,
}

struct Builder<'a> {
    nodes: &'a mut Vec<Node>,
    /// Nodes that the key may still have.
    left: usize,
    budget: &'a Budget,
}

impl Builder<'_> {
    fn add(&mut self, node: Node) -> Result<u32, Obstacle> {
        if self.left == 0 || !self.budget.spend(STEPS_OF_NODE) {
            return Err(Obstacle::Exceeded);
        }
        self.left -= 1;
        self.nodes.push(node);
        u32::try_from(self.nodes.len() - 1).map_err(|_| Obstacle::Exceeded)
    }

    /// The node at which an expression is read backwards, to go on at `next`.
    fn build(&mut self, expression: &Hir, next: u32) -> Result<u32, Obstacle> {
        match expression.kind() {
            HirKind::Empty => Ok(next),
            HirKind::Literal(literal) => literal
                .0
                .iter()
                .try_fold(next, |next, byte| self.add(Node::Bytes([(*byte, *byte)].into(), next))),
            HirKind::Class(Class::Bytes(class)) => {
                let ranges = class.ranges().iter().map(|range| (range.start(), range.end()));
                self.add(Node::Bytes(ranges.collect(), next))
            }
            // The parser makes these of alternatives, too.
            HirKind::Class(Class::Unicode(class)) => {
                let bytes = class.to_byte_class().ok_or(Obstacle::Foreign)?;
                let ranges = bytes.ranges().iter().map(|range| (range.start(), range.end()));
                self.add(Node::Bytes(ranges.collect(), next))
            }
            HirKind::Look(Look::Start) => self.add(Node::Beginning(next)),
            HirKind::Look(Look::End) => self.add(Node::End(next)),
            HirKind::Look(_) => Err(Obstacle::Foreign),
            HirKind::Capture(capture) => self.build(&capture.sub, next),
            HirKind::Concat(parts) => {
                parts.iter().try_fold(next, |next, part| self.build(part, next))
            }
            HirKind::Alternation(ways) => {
                let nowhere = self.add(Node::Nowhere)?;
                ways.iter().try_fold(nowhere, |others, way| {
                    let way = self.build(way, next)?;
                    self.add(Node::Either(way, others))
                })
            }
            HirKind::Repetition(repetition) => {
                let (low, sub) = (repetition.min, &repetition.sub);
                let mut entry = next;
                match repetition.max {
                    None => {
                        entry = self.add(Node::Nowhere)?;
                        let again = self.build(sub, entry)?;
                        self.nodes[entry as usize] = Node::Either(again, next);
                    }
                    Some(high) => {
                        for _ in low..high {
                            let once = self.build(sub, entry)?;
                            entry = self.add(Node::Either(once, next))?;
                        }
                    }
                }
                for _ in 0..low {
                    entry = self.build(sub, entry)?;
                }
                Ok(entry)
            }
        }
    }
}

/// Whether a key holds only what all three dialects read alike: characters, dots, escaped
/// punctuation, `\d`, `\w`, `\s` and their opposites, plain classes, groups, alternatives, counts,
/// `^` and `$`.
fn is_common(key: &str) -> bool {
    if !key.is_ascii() {
        return false;
    }
    let bytes = key.as_bytes();
    let mut at = 0;
    let mut in_class = false;
    while at < bytes.len() {
        let next = bytes.get(at + 1).copied().unwrap_or(0);
        match bytes[at] {
            b'\\' => {
                let plain = next.is_ascii_punctuation() && !matches!(next, b'<' | b'>');
                if !(plain || b"dwsDWS".contains(&next)) {
                    return false;
                }
                at += 1;
            }
            // Within a class the dialects differ in nested ones and in operations on sets.
            b'[' if in_class => return false,
            b']' if in_class => in_class = false,
            byte if in_class && b"&~-^".contains(&byte) && next == byte => return false,
            _ if in_class => {}
            b'[' => {
                in_class = true;
                // A closing bracket that stands first is a member, a caret negates.
                let first = if next == b'^' { at + 2 } else { at + 1 };
                if bytes.get(first).is_none_or(|byte| *byte == b']') {
                    return false;
                }
                at = first - 1;
            }
            b'(' if next == b'?' && bytes.get(at + 2) != Some(&b':') => return false,
            b'(' if next == b'?' => at += 2,
            b']' | b'}' | b'\n' | 0 => return false,
            // Counted as Python and the others count, not as a literal brace.
            b'{' => match count_at(&bytes[at..]) {
                Some(length) => {
                    at += length - 1;
                    if bytes.get(at + 1) == Some(&b'+') {
                        return false;
                    }
                }
                None => return false,
            },
            // Possessive in Python, not so in `regex`.
            b'*' | b'+' | b'?' if next == b'+' => return false,
            _ => {}
        }
        at += 1;
    }
    !in_class
}

/// The length of `{n}`, `{n,}` or `{n,m}` at the beginning of some bytes.
fn count_at(bytes: &[u8]) -> Option<usize> {
    let end = bytes.iter().position(|byte| *byte == b'}')?;
    let inner = std::str::from_utf8(&bytes[1..end]).ok()?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (low, high) = inner.split_once(',').map_or((inner, None), |(low, high)| (low, Some(high)));
    let fits = is_number(low) && high.is_none_or(|high| high.is_empty() || is_number(high));
    fits.then_some(end + 1)
}
