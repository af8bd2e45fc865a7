//! Keys that are names: characters that stand for themselves and dots that stand for any. Keys of
//! one length with dots at the same places differ in the rest only, which is looked up.

use std::collections::HashMap;

use super::{Budget, Fault};

/// Where dots stand in a key, and whether it is anchored.
#[derive(Debug, Clone)]
struct Shape {
    /// The key began with `^`: nothing may stand before it.
    anchored: bool,
    dots: Vec<usize>,
    /// By the characters, dots blanked: the first key.
    keys: HashMap<Vec<char>, usize>,
    /// The first of all these keys.
    first: usize,
}

/// All keys that are names.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    /// By the number of characters.
    shapes: HashMap<usize, Vec<Shape>>,
    /// By shape: its position among those of its length.
    known: HashMap<(bool, usize, Vec<usize>), usize>,
}

/// Stands in a key's place for any character but the end of a line.
const BLANK: char = '\0';

impl Names {
    /// Adds a key, if it is a name.
    pub fn add(&mut self, position: usize, key: &str) -> bool {
        let Some((anchored, characters)) = read(key) else { return false };
        let is_dot = |(at, one): (usize, &Option<char>)| one.is_none().then_some(at);
        let dots: Vec<usize> = characters.iter().enumerate().filter_map(is_dot).collect();
        let length = characters.len();
        let characters = characters.into_iter().map(|one| one.unwrap_or(BLANK)).collect();
        let shapes = self.shapes.entry(length).or_default();
        let at = *self.known.entry((anchored, length, dots.clone())).or_insert_with(|| {
            shapes.push(Shape { anchored, dots, keys: HashMap::new(), first: position });
            shapes.len() - 1
        });
        shapes[at].keys.entry(characters).or_insert(position);
        true
    }

    /// The first key that is the end of a path, all of it or after a dot.
    pub fn first_match(&self, path: &str, budget: &Budget) -> Result<Option<usize>, Fault> {
        if self.shapes.is_empty() {
            return Ok(None);
        }
        let characters: Vec<char> = path.chars().collect();
        let mut first = None;
        let mut blanked = Vec::new();
        // Python's `$` stands at the end and before a last line's end.
        let ends = [characters.len(), characters.len().wrapping_sub(1)];
        let ends = &ends[..1 + usize::from(characters.last() == Some(&'\n'))];
        let mut starts = vec![0];
        for (position, character) in characters.iter().enumerate() {
            match character {
                '.' => starts.push(position + 1),
                // What stands before a name is of one line.
                '\n' => break,
                _ => {}
            }
        }
        for (start, end) in
            starts.iter().flat_map(|start| ends.iter().map(move |end| (*start, *end)))
        {
            let Some(name) = characters.get(start..end) else { continue };
            let shapes = self.shapes.get(&name.len()).map_or(&[][..], Vec::as_slice);
            for shape in shapes {
                let late = first.is_some_and(|first| first < shape.first);
                if late || shape.anchored && start > 0 {
                    continue;
                }
                if !budget.spend(1 + name.len() as u64) {
                    return Err(Fault::Exceeded(shape.first));
                }
                if shape.dots.iter().any(|dot| name[*dot] == '\n') {
                    continue;
                }
                blanked.clear();
                blanked.extend_from_slice(name);
                shape.dots.iter().for_each(|dot| blanked[*dot] = BLANK);
                if let Some(found) = shape.keys.get(blanked.as_slice()) {
                    first = Some(first.map_or(*found, |first: usize| first.min(*found)));
                }
            }
        }
        Ok(first)
    }
}

/// A key's characters, `None` for any but the end of a line, and whether it began with `^`; if the
/// key is a name.
fn read(key: &str) -> Option<(bool, Vec<Option<char>>)> {
    let (anchored, key) = key.strip_prefix('^').map_or((false, key), |rest| (true, rest));
    let mut characters = Vec::with_capacity(key.len());
    let mut rest = key.chars();
    while let Some(character) = rest.next() {
        characters.push(match character {
            '.' => None,
            // What comes after the end is the same end again.
            '$' if rest.as_str().is_empty() => break,
            '\\' => {
                let escaped = rest.next()?;
                let is_plain = escaped.is_ascii_punctuation() && !matches!(escaped, '<' | '>');
                Some(escaped).filter(|_| is_plain)?.into()
            }
            '^' | '$' | '|' | '?' | '*' | '+' | '(' | ')' | '[' | ']' | '{' | '}' | BLANK => {
                return None;
            }
            other => Some(other),
        });
    }
    Some((anchored, characters))
}
