//! "Did you mean …?": the known name closest to what somebody typed.

/// The candidate closest to `typed`, if one is close enough to be a likely typo or a part of the name.
pub fn nearest<'a>(typed: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let typed_folded = fold(typed);
    let limit = (typed_folded.chars().count() / 3).clamp(1, 4);
    candidates
        .into_iter()
        .filter_map(|candidate| {
            let folded = fold(candidate);
            let distance = edit_distance(&typed_folded, &folded);
            let is_part = typed_folded.len() >= 3
                && (folded.contains(&typed_folded) || typed_folded.contains(&folded));
            (distance <= limit || is_part).then_some((distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// ` (did you mean "x"?)`, or nothing.
pub fn hint<'a>(typed: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(typed, candidates)
        .map_or_else(String::new, |name| format!(" (did you mean \"{name}\"?)"))
}

/// `-` and `_` and letter case are what people mix up most.
fn fold(name: &str) -> String {
    name.chars().take(64).map(|c| if c == '-' { '_' } else { c.to_ascii_lowercase() }).collect()
}

/// Levenshtein distance with a swap of neighbours as one step.
fn edit_distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let mut before: Vec<usize> = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, &ca) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &cb) in b.iter().enumerate() {
            let mut best = (last[j] + usize::from(ca != cb)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && ca == b[j - 1] && a[i - 1] == cb {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typos_find_their_name_and_noise_finds_nothing() {
        let names = ["num_blocks", "block_size", "name", "uuid"];
        assert_eq!(nearest("num_block", names), Some("num_blocks"));
        assert_eq!(nearest("blocksize", names), Some("block_size"));
        assert_eq!(nearest("block-size", names), Some("block_size"));
        assert_eq!(nearest("nmae", names), Some("name"));
        assert_eq!(nearest("zzzz", names), None);
        assert_eq!(nearest("", names), None);
        assert_eq!(hint("uid", names), " (did you mean \"uuid\"?)");
    }
}
