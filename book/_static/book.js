// Names, in Japanese, for the controls that the themes leave unnamed or in English.
document.addEventListener("DOMContentLoaded", () => {
  const name = (selector, label) =>
    document.querySelectorAll(selector).forEach((element) => element.setAttribute("aria-label", label));
  name(".bd-links details > summary", "章の中のページを開閉する");
  name("details.hide > summary", "コードを開閉する");
  name("button.primary-toggle", "章の一覧を開閉する");
  name("button.secondary-toggle, button.sbt-secondary-toggle", "目次を開閉する");
  name("button.toggle-button", "解答を開閉する");

  // Whoever has no pointer must be able to scroll a wide picture or table.
  document
    .querySelectorAll(".labs-figure, .pst-scrollable-table-container")
    .forEach((wide) => wide.setAttribute("tabindex", "0"));
  // Sphinx has no Japanese for the first of these, and a long one about categories for the second.
  if (document.documentElement.lang === "ja" && typeof Documentation !== "undefined") {
    Object.assign(Documentation.TRANSLATIONS, {
      "Search finished, found ${resultCount} page(s) matching the search query.": "${resultCount} 件見つかりました。",
      "Your search did not match any documents. Please make sure that all words are spelled correctly and that you've selected enough categories.":
        "見つかりませんでした。言葉を短くするか、英語の用語でも試してみてください。",
      ", in ": "：",
    });
  }
});
