//! Names that are held against the ends of others, found in one look-up for each length.

use std::collections::HashMap;

/// Given names, of which it is asked which the ends of others are.
#[derive(Debug, Clone, Default)]
pub struct Endings {
    /// By length in bytes: each name's position.
    by_length: HashMap<usize, HashMap<String, usize>>,
}

impl Endings {
    /// Of these names. Of two that are the same the first counts.
    pub fn of<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut endings = Self::default();
        for (position, name) in names.enumerate() {
            let alike = endings.by_length.entry(name.len()).or_default();
            alike.entry(name.to_owned()).or_insert(position);
        }
        endings
    }

    /// The position of the first name with which another ends, as `str::ends_with` has it.
    pub fn first_end_of(&self, text: &str) -> Option<usize> {
        let ends = self.by_length.iter().filter_map(|(length, names)| {
            names.get(text.get(text.len().checked_sub(*length)?..)?).copied()
        });
        ends.min()
    }
}

/// The order of names by their last characters, so that all that end in something stand together.
/// The names themselves stay where they are: `name` gives each by its position.
#[derive(Debug, Clone, Default)]
pub struct Backwards {
    positions: Vec<usize>,
}

impl Backwards {
    /// Of that many names.
    pub fn of<'a>(count: usize, name: impl Fn(usize) -> &'a str) -> Self {
        let mut positions: Vec<_> = (0..count).collect();
        positions.sort_unstable_by(|left, right| {
            name(*left).bytes().rev().cmp(name(*right).bytes().rev())
        });
        Self { positions }
    }

    /// The positions of those that end in a text, ascending.
    pub fn ending_in<'a>(&self, text: &str, name: impl Fn(usize) -> &'a str) -> Vec<usize> {
        // Whatever ends in the text stands where the text itself would, or after.
        let is_before = |position: &usize| name(*position).bytes().rev().lt(text.bytes().rev());
        let start = self.positions.partition_point(is_before);
        let ends = |position: &usize| name(*position).ends_with(text);
        let mut found: Vec<_> = self.positions[start..].iter().copied().take_while(ends).collect();
        found.sort_unstable();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_that_ends_another_is_found() {
        let endings = Endings::of(["head", "lm_head", "head", "", "ü"].into_iter());
        assert_eq!(endings.first_end_of("model.lm_head"), Some(0));
        assert_eq!(endings.first_end_of("model.norm"), Some(3));
        assert_eq!(endings.first_end_of("ä"), Some(3));
        assert_eq!(Endings::of(["head"].into_iter()).first_end_of("ead"), None);
    }

    #[test]
    fn names_with_an_end_in_common_stand_together() {
        let names = ["b.x", "a.b.x", "x", "c.y", "ab.x", "a.b.x.z"];
        let backwards = Backwards::of(names.len(), |position| names[position]);
        let ending = |text: &str| -> Vec<&str> {
            let found = backwards.ending_in(text, |position| names[position]);
            found.into_iter().map(|position| names[position]).collect()
        };
        for text in ["", "x", ".x", "b.x", ".b.x", "y", "q", "a.b.x", "zz.a.b.x"] {
            let plain: Vec<_> = names.into_iter().filter(|name| name.ends_with(text)).collect();
            assert_eq!(ending(text), plain, "{text}");
        }
    }
}
